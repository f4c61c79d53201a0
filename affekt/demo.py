"""The whole way once, on the embedded corpus: synth, prepare, pretrain, export, probe, report."""

import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import resources
from pathlib import Path
from typing import Any

from affekt.data.errors import SettingsError

CLIPS, SPEAKERS, SECONDS = 480, 32, 3.0
FACE_SIZE = 112  # px of the stored crop: the nano model sees 96

Report = Callable[[int, int], None]


def demo(
    out: Path,
    seed: int,
    workers: int,
    progress: Callable[[str, str], AbstractContextManager[Report]],
    fresh: bool = False,
) -> dict[str, Any]:
    """Run every stage that is not done yet in the folder `out` and return the probe's results.

    `progress(label, unit)` gives a context with `report(done, total)`. The results carry `seconds_by_stage` of this
    call and the path of the report. Interrupted or repeated, the same call goes on where it stopped; `fresh` starts
    over. Raises SettingsError when the folder holds another seed's demo.
    """
    from affekt.data.prepare import PrepareSettings, prepare
    from affekt.data.synth.corpus import synthesise
    from affekt.finetune.probes.probe import ProbeSettings, probe
    from affekt.pretrain.export import export
    from affekt.pretrain.loop import pretrain
    from affekt.pretrain.settings import PretrainSettings

    if fresh and out.exists():
        if not (out / "corpus" / "synth.json").is_file():
            raise SettingsError(f"{out}: --fresh would delete what is there, which is no demo's; choose another --out")
        for part in ("corpus", "shards", "pretrain", "export", "features"):
            shutil.rmtree(out / part, ignore_errors=True)
    corpus, shards, run, exported = (out / name for name in ("corpus", "shards", "pretrain", "export"))
    seconds = {}
    started = time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal started
        seconds[stage] = round(time.perf_counter() - started, 1)
        started = time.perf_counter()

    with progress("synth", "clips") as report:
        synthesise(corpus, clips=CLIPS, speakers=SPEAKERS, seed=seed, seconds=SECONDS, workers=workers, progress=report)
    lap("synth")
    with progress("prepare", "clips") as report:
        prepare(corpus / "manifest.csv", shards, PrepareSettings(size=FACE_SIZE), workers=workers, progress=report)
    lap("prepare")
    recipe = [f"out={run}", f"data.shards={shards}", f"train.seed={seed}"]
    settings = PretrainSettings.read(experiment("demo"), recipe)
    with progress("pretrain", "steps") as report:
        pretrain(settings, resume="auto", progress=lambda step, total, _: report(step, total))
    lap("pretrain")
    export(run, exported)
    lap("export")
    where = [f"shards={shards}", f"encoder={exported}", f"run={run}", f"output={out}", f"seed={seed}"]
    with progress("features", "windows") as report:
        results = probe(ProbeSettings.read(experiment("demo_probe"), where), progress=report)
    lap("probe and report")
    return {**results, "seconds_by_stage": seconds, "report": str(out / "report.html")}


def experiment(name: str) -> Path:
    """The file of a shipped experiment."""
    return Path(str(resources.files("affekt.launch") / f"{name}.yaml"))
