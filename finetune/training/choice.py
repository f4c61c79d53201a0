"""The score of development clips that the epoch is chosen by: higher is better."""

from affekt.data.errors import SettingsError
from affekt.finetune.metrics.catalogue import all_scores
from affekt.finetune.predictions import Predictions
from affekt.finetune.scores import main_score, values
from affekt.finetune.training.settings import FinetuneSettings


def name_of_choice(settings: FinetuneSettings) -> str:
    return settings.train.choose_by or main_score(settings.task)


def score_to_choose_by(predictions: Predictions, settings: FinetuneSettings) -> float:
    """Errors, of which less is better, with the sign changed. Raises SettingsError for a score that the clips do not
    allow."""
    name, there = name_of_choice(settings), all_scores(predictions)
    if name not in there:
        raise SettingsError(f"train.choose_by: the development clips have no {name}; they have {', '.join(there)}")
    value = values(predictions, [name])[name]
    return value if there[name].higher else -value
