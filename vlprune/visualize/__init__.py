"""Pictures of what a method keeps: which tokens of an image are left after each stage, what merged, what scored how.

::

    with vlprune.applied(model, "hired", budget=0.2), visualize.watched(model) as seen:
        model.generate(**inputs)
        report = vlprune.report(model)
    visualize.show_kept(image, report, processor=processor).save("kept.png")
    visualize.show_stages(image, report, processor=processor)
    visualize.show_merge_groups(image, report, seen)
    visualize.show_scores(image, report, seen)

``image`` is a pillow image, a path, or the list of a video's frames as the model saw them; each function returns a pillow
image. Without ``processor`` pictures are drawn as the family's usual one cuts and pads them.
"""

from vlprune.visualize.places import Geometry, View, views
from vlprune.visualize.show import show_kept, show_merge_groups, show_scores, show_stages
from vlprune.visualize.watch import Watched, watched

__all__ = [
    "Geometry",
    "View",
    "Watched",
    "show_kept",
    "show_merge_groups",
    "show_scores",
    "show_stages",
    "views",
    "watched",
]
