"""The score of development clips that the epoch is chosen by: higher is better."""

from affekt.data.errors import SettingsError
from affekt.finetune.metrics.confusion import SCORES, confusion_matrix
from affekt.finetune.predictions import Predictions
from affekt.finetune.training.settings import FinetuneSettings


def main_score(predictions: Predictions, settings: FinetuneSettings) -> float:
    name = settings.train.choose_by or "uar"
    if name not in SCORES:
        raise SettingsError(f"train.choose_by {name}: choose one of {', '.join(SCORES)}")
    known = predictions.take(predictions.label >= 0)
    matrix = confusion_matrix(known.label, known.logits.argmax(1), len(known.classes))
    return float(SCORES[name](matrix))
