"""The machinery that takes visual tokens out of an unmodified model. No model's name occurs here."""
