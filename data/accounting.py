"""How many clips were used and how many could not be read: exact, over all ranks and resumes, with a budget."""

import json
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist

from affekt.data.batch import Batch
from affekt.data.errors import DataError


class Accounting:
    """Counts clips of one rank: planned = used + skipped, where a clip that stands in for another is planned too."""

    def __init__(self, used: int = 0, skipped: dict[str, int] | None = None):
        self.used = used
        self.skipped = Counter(skipped or {})  # `cause: file, clip and what is wrong` -> how often
        self._before: Accounting | None = None  # what all ranks together had counted when the run was resumed

    @property
    def planned(self) -> int:
        return self.used + self.skipped.total()

    @property
    def causes(self) -> dict[str, int]:
        """Skipped clips by cause."""
        causes: Counter[str] = Counter()
        for text, count in self.skipped.items():
            causes[text.partition(":")[0]] += count
        return dict(causes.most_common())

    def add(self, batch: Batch) -> None:
        self.used += len(batch.ids)
        self.skipped.update(cause for _, cause in batch.skipped)

    def summed_over_ranks(self) -> "Accounting":
        """The same sum on every rank, which all must ask for. Without torch.distributed, this process's own."""
        parts = [{"used": self.used, "skipped": self.skipped}]
        if dist.is_initialized() and dist.get_world_size() > 1:
            parts = all_gather_json(parts[0])
        if self._before:
            parts.append({"used": self._before.used, "skipped": self._before.skipped})
        total = Accounting()
        for part in parts:
            total.used += part["used"]
            total.skipped.update(part["skipped"])
        return total

    def check(self, budget: float = 0.01, at_least: int = 10) -> None:
        """Raises DataError when more than `at_least` clips and more than the share `budget` could not be used."""
        bad = self.skipped.total()
        if bad <= at_least or bad <= budget * self.planned:
            return
        causes = ", ".join(f"{cause} {count}" for cause, count in self.causes.items())
        worst = "\n".join(f"  {count} times {text}" for text, count in self.skipped.most_common(5))
        raise DataError(
            f"{bad} of {self.planned} clips ({bad / self.planned:.1%}) could not be used, more than {budget:.1%} "
            f"({causes}); copy or prepare the shards again. The worst:\n{worst}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {"planned": self.planned, "used": self.used, "causes": self.causes, "skipped": dict(self.skipped)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Accounting":
        """Go on counting from a sum over all ranks: each rank starts at zero and the sum is added once."""
        accounting = cls()
        accounting._before = cls(values["used"], values["skipped"])
        return accounting


def all_gather_json(value: Any) -> list[Any]:
    """`value` of every rank. As JSON in tensors: `all_gather_object` would unpickle what arrives."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(content)], device=device))
    longest = max(int(length) for length in lengths)
    gathered = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in lengths]
    dist.all_gather(gathered, torch.nn.functional.pad(content, (0, longest - len(content))))
    return [json.loads(bytes(part[: int(n)].cpu().numpy())) for part, n in zip(gathered, lengths)]
