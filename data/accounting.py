"""How many clips were used and how many could not be read: exact, over all ranks and resumes, with a budget."""

import hashlib
import json
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist

from affekt.data.batch import Batch
from affekt.data.errors import DataError

FIRST_CLIPS = 1000  # a share is judged of no fewer clips: ten unreadable ones at the start are not yet over 1 %


class Accounting:
    """Counts clips of one rank: planned = used + skipped + padded.

    `skipped` could not be read; the clip that stands in for one is planned too. `padded` are places that a rank without
    data filled with blank rows, from which nothing is learned, until all ranks stopped. Several views of one decoded
    clip count once. The tail of an epoch that fills no batch is not planned.

    `ledger` tells runs apart by which clip stood where: a sum of digests of (step, row, id), so that the ranks of any
    world, and a run in pieces, come to the sum of the straight run of one process.
    """

    def __init__(self, used: int = 0, skipped: dict[str, int] | None = None, padded: int = 0, ledger: int = 0):
        self.used, self.padded, self.ledger = used, padded, ledger
        self.skipped = Counter(skipped or {})  # `cause: file, clip and what is wrong` -> how often
        self._before: Accounting | None = None  # what all ranks together had counted when the run was resumed

    @property
    def planned(self) -> int:
        return self.used + self.skipped.total() + self.padded

    @property
    def causes(self) -> dict[str, int]:
        """Skipped clips by cause."""
        return _causes(self.skipped)

    def add(self, batch: Batch, step: int = 0, rank: int = 0) -> None:
        """Count the batch that a rank had at a step."""
        for row in range(0, len(batch.ids), batch.repeats):
            if batch.ids[row]:
                place = f"{step}\0{rank * len(batch.ids) + row}\0{batch.ids[row]}"
                self.ledger += int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest())
                self.used += 1
            else:
                self.padded += 1
        self.ledger %= 2**64
        self.skipped.update(cause for _, cause in batch.skipped)

    def over_budget(self, budget: float, at_least: int = FIRST_CLIPS) -> bool:
        """Whether more than the share `budget` of what all ranks planned, and of `at_least` clips, could not be used.
        All of them must ask."""
        bad, planned = sum_over_ranks([self.skipped.total(), self.planned])
        if self._before:
            bad, planned = bad + self._before.skipped.total(), planned + self._before.planned
        return bad > budget * max(planned, at_least)

    def summed_over_ranks(self) -> "Accounting":
        """The same sum on every rank, which all must ask for. Without torch.distributed, this process's own."""
        own = {"used": self.used, "skipped": self.skipped, "padded": self.padded, "ledger": self.ledger}
        total = Accounting()
        parts = [Accounting(**part) for part in (all_gather_json(own) if _world_size() > 1 else [own])]
        for part in (*parts, *([self._before] if self._before else [])):
            total.used += part.used
            total.padded += part.padded
            total.skipped.update(part.skipped)
            total.ledger = (total.ledger + part.ledger) % 2**64
        return total

    def check(self, budget: float, finished: bool = False) -> None:
        """Raises DataError on all ranks when `over_budget`, with the causes and the worst files. A finished run is
        judged by what it planned, however little that is."""
        if self.over_budget(budget, 0 if finished else FIRST_CLIPS):
            summed = self.summed_over_ranks()
            bad, planned = summed.skipped.total(), summed.planned
            kept = "training is complete and its checkpoints are kept, but " if finished else ""
            raise DataError(
                f"{kept}{bad} of {planned} clips ({bad / planned:.1%}) could not be used, more than {budget:.1%}; copy "
                f"or prepare the shards again, or set data.skip_budget: {worst(summed.skipped)}"
            )

    def __str__(self) -> str:
        causes = "".join(f", {cause} {count}" for cause, count in self.causes.items())
        padded = f" + {self.padded} padded" if self.padded else ""
        return f"{self.planned} clips planned = {self.used} used + {self.skipped.total()} skipped{causes}{padded}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "planned": self.planned,
            "used": self.used,
            "padded": self.padded,
            "causes": self.causes,
            "skipped": dict(self.skipped),
            "ledger": f"{self.ledger:016x}",
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Accounting":
        """Go on counting from a sum over all ranks: each rank starts at zero and the sum is added once."""
        accounting = cls()
        ledger = int(values.get("ledger", "0"), 16)
        accounting._before = cls(values["used"], values["skipped"], values.get("padded", 0), ledger)
        return accounting


def worst(skipped: Counter[str]) -> str:
    """`cause count, ...`, and a line for each of the five clips that were met most often."""
    causes = ", ".join(f"{cause} {count}" for cause, count in _causes(skipped).items())
    return "\n".join([causes, *(f"  {count} times {text}" for text, count in skipped.most_common(5))])


def _causes(skipped: Counter[str]) -> dict[str, int]:
    causes: Counter[str] = Counter()
    for text, count in skipped.items():
        causes[text.partition(":")[0]] += count
    return dict(causes.most_common())


def sum_over_ranks(values: list[int]) -> list[int]:
    """The sums on every rank, which all must ask for with as many values."""
    if _world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.int64, device=device_of_collectives())
    dist.all_reduce(total)
    return total.tolist()


def all_gather_json(value: Any) -> list[Any]:
    """`value` of every rank. As JSON in tensors: `all_gather_object` would unpickle what arrives."""
    device = device_of_collectives()
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(content)], device=device))
    longest = max(int(length) for length in lengths)
    gathered = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in lengths]
    dist.all_gather(gathered, torch.nn.functional.pad(content, (0, longest - len(content))))
    return [json.loads(bytes(part[: int(n)].cpu().numpy())) for part, n in zip(gathered, lengths)]


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def device_of_collectives() -> torch.device:
    """Where the tensors have to be that ranks exchange."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
