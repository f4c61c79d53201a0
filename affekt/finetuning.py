"""`affekt finetune`: teaches an encoder to name what people express, and scores what it learned."""

import json
import os

from rich.console import Console

from affekt.arguments import AsJson, Config, Overrides, PrintConfig, find_experiment
from affekt.progress import progress


def finetune(
    config: Config, overrides: Overrides = None, print_config: PrintConfig = False, as_json: AsJson = False
) -> None:
    """Fine-tune on labelled clips, choose on development clips, score test clips once; goes on where it was ended."""
    path = find_experiment(config)
    from affekt.finetune.schema import Results
    from affekt.finetune.table import show
    from affekt.finetune.training.loop import finetune as train
    from affekt.finetune.training.outcome import corpus_folder
    from affekt.finetune.training.settings import FinetuneSettings

    settings = FinetuneSettings.read(path, overrides or [])
    if print_config:
        print(settings.explained(), end="")
        return
    with progress("finetune", "steps", quiet=as_json) as report:
        results = train(settings, report)
    if int(os.environ.get("RANK", 0)):
        return
    if as_json:
        print(json.dumps(results.model_dump(mode="json"), ensure_ascii=False))
        return
    for folder in sorted({corpus_folder(settings, part) for part in settings.data.parts if part.test}):
        show(Results.read(folder / "results.json"), Console())
        print(f"all scores: {folder / 'results.csv'}\nreport: {folder / 'report.html'}")
    print(f"next: affekt predict FILE --model {settings.out}/seed-{settings.seeds[0]}/model")
