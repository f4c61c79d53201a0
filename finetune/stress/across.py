"""One model on several corpora: scores that are fair to a test set which lacks some of its classes."""

from collections.abc import Mapping

import numpy as np

from affekt.data.errors import SettingsError
from affekt.finetune.predictions import Predictions
from affekt.finetune.schema import Table
from affekt.finetune.scores import score

# Where every class is there, the score beside each is the same by definition, and the only one that is computed.
CLASSES = {"uar": "uar", "present_macro_f1": "macro_f1", "masked_uar": "uar", "masked_macro_f1": "macro_f1"}
HEAD = ("Test clips of", "Clips", "Classes", "UAR", "Macro F1", "UAR, masked", "Macro F1, masked")


def across_corpora(tables: Mapping[str, Predictions], bootstrap: int = 2000) -> Table:
    """A row per corpus with 95 % intervals; of dimensions the CCC of each.

    `present`: averages run over the classes that occur in the corpus, and an answer outside of them is wrong. `masked`:
    the answer is sought among those classes alone, which needs to be known beforehand. Raises SettingsError where a
    corpus has nothing to score.
    """
    dimensions = next(iter(tables.values())).dimensions
    if not next(iter(tables.values())).classes:
        head, names = ("Test clips of", "Clips", *(f"CCC {d}" for d in dimensions)), [f"ccc_{d}" for d in dimensions]
        rows = [[corpus, f"{len(t):,}", *_cells(t, dict(zip(names, names)), bootstrap)] for corpus, t in tables.items()]
        return Table(title="Across corpora", head=list(head), rows=rows)
    rows = []
    for corpus, table in tables.items():
        if table.kind != "single" or table.label is None or not (table.label >= 0).any():
            raise SettingsError(f"{corpus}: scores across corpora are of one class a clip, and no clip has one")
        known = table.take(table.label >= 0)
        present = len(np.unique(known.label))
        cells = _cells(known, CLASSES, bootstrap)
        rows.append([corpus, f"{len(known):,}", f"{present} of {len(known.classes)}", *cells])
    note = (
        "Over the classes that a corpus has; masked: with the answer sought among these alone. In percent, with 95 %"
        " intervals."
    )
    return Table(title="Across corpora", head=list(HEAD), rows=rows, note=note)


def _cells(table: Predictions, names: Mapping[str, str], bootstrap: int) -> list[str]:
    found = score(table, bootstrap=bootstrap)
    cells = []
    for name, otherwise in names.items():
        e = found.get(name) or found[otherwise]
        factor, digits = (1, 3) if name.startswith("ccc") else (100, 1)
        value, low, high = (f"{factor * x:.{digits}f}" for x in (e.value, e.low, e.high))
        cells.append(f"{value} [{low}, {high}]")
    return cells
