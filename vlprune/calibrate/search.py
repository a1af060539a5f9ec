"""Searches a method's knobs: those that change the answers' hidden states least, at one budget. Resumable, with optuna."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import vlprune.integrations  # noqa: F401  (registers the families of models)
from vlprune import budget as budgets
from vlprune.calibrate.states import Answered, answered, distance
from vlprune.engine.family import IMAGE, Family, family_of
from vlprune.errors import BudgetError, OptionError, UnsupportedMethodError, VLPruneError
from vlprune.image import ImageLayout, ModelShape
from vlprune.method import Method, make, methods

STARTUP = 10
"""Trials by chance before earlier ones tell where to look; a trial is given up early only behind them."""


@dataclass
class Found:
    """The best settings so far. ``loss``: mean distance over all samples; ``default``: that of the published settings."""

    method: Method
    loss: float
    default: float
    trials: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """JSON that ``vlprune.apply(model, config=path)`` reads; written whole or not at all."""
        numbers = {"loss": self.loss, "loss of the defaults": self.default, "trials": self.trials}
        part = path.with_name(f"{path.name}.part")
        text = {"settings": self.method.to_dict(), "calibrated": {**self.notes, **numbers}}
        part.write_text(json.dumps(text, indent=2) + "\n")
        part.replace(path)


class Drawn:
    """Knobs by an optuna trial; see :class:`vlprune.knobs.Draw`."""

    def __init__(self, trial: Any):
        self.trial = trial

    def number(self, name: str, low: float, high: float) -> float:
        return self.trial.suggest_float(name, low, high)

    def whole(self, name: str, low: int, high: int) -> int:
        return self.trial.suggest_int(name, low, high)

    def choice(self, name: str, values: Sequence[Any]) -> Any:
        return self.trial.suggest_categorical(name, list(values))


class Search:
    """Trials of one method at one budget on batches that the unpruned model has ``answered``.

    ``notes`` say what is searched: they go into the file, and trials of other notes are not counted.
    """

    def __init__(self, model: Any, method: str, budget: float | int, batches: Sequence[Answered], notes: dict[str, Any]):
        self.default = check(method, budget)
        self.model, self.batches = model, batches
        self.family: Family = family_of(model)
        self.shape: ModelShape = self.family.parts(model).shape
        self.notes = {"method": method, "budget": budget, **notes}
        self.layouts = _distinct([one for batch in batches for one in self.family.seams[IMAGE](model, dict(batch.inputs))])

    def run(self, out: Path, trials: int, seed: int = 0, progress: Callable[[Found], None] = lambda found: None) -> Found:
        """Goes on to ``trials`` in all, from what is in the journal beside ``out``, which has the best at any time."""
        study, default = self._study(out, seed), self.loss(self.default)
        before = study.user_attrs.get("default", default)
        if not math.isclose(before, default, rel_tol=1e-3):
            raise VLPruneError(
                f"{_journal(out)} has trials where the defaults lose {before:.6f}, now it is {default:.6f}: the model or the "
                "data are others under the same name; choose another file, or delete the journal"
            )
        study.set_user_attr("default", default)
        self._best(study, default).save(out)

        def tell(study: Any, trial: Any) -> None:
            now = self._best(study, default)
            now.save(out)
            progress(now)

        missing = trials - len(_ended(study))
        if missing > 0:
            study.optimize(self._objective, n_trials=missing, callbacks=[tell])
        return self._best(study, default)

    def loss(self, method: Method, report: Callable[[float, int], None] = lambda loss, batch: None) -> float:
        """Mean distance over all samples; ``report`` is told the mean over those until then, batch by batch."""
        seen = []
        for number, batch in enumerate(self.batches):
            seen.append(distance(self.model, method, batch))
            report(torch.cat(seen).mean().item(), number)
        return torch.cat(seen).mean().item()

    def _study(self, out: Path, seed: int) -> Any:
        import optuna
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        out.parent.mkdir(parents=True, exist_ok=True)
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(_journal(out))))
        name = json.dumps(self.notes, sort_keys=True)
        study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
        # A run that goes on must not draw again what was drawn before.
        study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials), n_startup_trials=STARTUP)
        study.pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=1)
        return study

    def _objective(self, trial: Any) -> float:
        import optuna

        try:
            method = self._drawn(trial)
            self._check(method)
        except (BudgetError, OptionError) as error:
            trial.set_user_attr("refused", str(error))
            raise optuna.TrialPruned from error

        def report(loss: float, batch: int) -> None:
            trial.report(loss, batch)
            if trial.should_prune():
                raise optuna.TrialPruned

        return self.loss(method, report)

    def _drawn(self, trial: Any) -> Method:
        return make(self.default, **type(self.default).knobs(Drawn(trial), self.shape))

    def _best(self, study: Any, default: float) -> Found:
        """The best of the trials, or the published settings, whose loss is ``default``, where none is better."""
        import optuna

        done = [trial for trial in _ended(study) if trial.state == optuna.trial.TrialState.COMPLETE]
        best = min(done, key=lambda trial: trial.value, default=None)
        if best is None or best.value >= default:
            return Found(self.default, default, default, len(_ended(study)), self.notes)
        drawn = self._drawn(optuna.trial.FixedTrial(best.params))
        return Found(drawn, best.value, default, len(_ended(study)), self.notes)

    # -------------------------------------------------------------- the budget

    def _check(self, method: Method) -> None:
        """Raises :class:`BudgetError` where ``method`` may spend more than the budget."""
        if method.adaptive:
            raise BudgetError(f"{method} decides by content how much it keeps")
        for layout in self.layouts:
            layers = self.shape.text_layers
            spent, published = (spending(one, layout, self.shape) for one in (method, self.default))
            # Tiny images keep a token, whatever the budget.
            room = max(published, budgets.room(method.budget, layout.total, layers))
            if spent > room:
                raise BudgetError(f"{method} spends {spent / layers:.1f} tokens a layer of {room / layers:.1f}")


def _journal(out: Path) -> Path:
    """Where the trials of a search stand."""
    return out.with_name(f"{out.stem}.journal")


def spending(method: Method, layout: ImageLayout, shape: ModelShape) -> int:
    """Token-layers of an image: its tokens summed over the LLM's layers, of a method that only evicts those in the cache."""
    plan = method.plan(layout, shape)
    there = plan.at_layers(shape.text_layers)
    if method.stages != ("evict",):
        return sum(there)
    return sum(plan.cached.get(layer, tokens) for layer, tokens in enumerate(there))


def knobs(
    model: Any,
    batches: Sequence[Any],
    method: str,
    out: str | Path,
    *,
    budget: float | int = 0.5,
    trials: int = 60,
    answer_tokens: int = 8,
    seed: int = 0,
    notes: dict[str, Any] | None = None,
    progress: Callable[[Found], None] = lambda found: None,
) -> Found:
    """Searches the knobs of ``method`` at ``budget`` and writes the best to ``out``, which ``apply(..., config=out)`` takes.

    ``batches``: inputs of ``model.generate``, padded on the left, a few dozen prompts in all. The pruned model is to have the
    last token's hidden states of the unpruned one, while ``answer_tokens`` of an answer are read. ``notes`` go into the file.
    Cut off, the same call goes on: trials stand in a journal beside ``out``. The model is the same afterwards.
    """
    check(method, budget)
    told = {**(notes or {}), "answer tokens": answer_tokens}
    found = Search(model, method, budget, [answered(model, one, answer_tokens) for one in batches], told)
    return found.run(Path(out), trials, seed, progress)


def check(method: str, budget: float | int) -> Method:
    """The method with its published settings; raises :class:`UnsupportedMethodError` where it names no knobs to try."""
    known = searchable()
    if method not in known:
        raise UnsupportedMethodError(f"{method!r} has no knobs to calibrate; those that have: {', '.join(known)}")
    return make(method, budget=budget)


def searchable() -> list[str]:
    """Methods for vision-language models that name knobs which may be tried."""
    return [name for name, cls in methods().items() if cls.knobs.__func__ is not Method.knobs.__func__]


def _ended(study: Any) -> list[Any]:
    """Trials that count: those that were interrupted, or failed, do not."""
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def _distinct(layouts: Sequence[ImageLayout]) -> list[ImageLayout]:
    return list({(one.total, one.grid, one.crops, tuple(one.available)): one for one in layouts}.values())
