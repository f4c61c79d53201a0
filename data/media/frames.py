"""A folder of numbered pictures as the film of a clip, as the field's lists name them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from affekt.data.manifest import frame_files
from affekt.data.media.container import Limits, MediaError, decode_stream, open_media, picture_stream


class FrameFolder:
    """Frames have no clock of their own: they are spread evenly over the sound of their clip, or stand at `fps`.

    `seconds` is how long they last together, `rate` how many there are a second.
    """

    def __init__(self, path: str | Path, sound_seconds: float | None, fps: float, limits: Limits):
        self.path, self.limits = Path(path), limits
        self.files = frame_files(path)
        if not self.files:
            raise MediaError("missing", f"{path}: a folder without pictures, or with films and sounds beside them")
        self.seconds = sound_seconds or len(self.files) / fps
        self.rate = len(self.files) / self.seconds
        if self.seconds > limits.max_source_duration:
            told = f"{self.seconds:.0f} s, the limit is {limits.max_source_duration:.0f} s"
            raise MediaError("too_long", f"{path}: {len(self.files)} frames, {told}")

    def __iter__(self) -> Iterator[tuple[float, Any]]:
        """(seconds, frame) in order; each picture is opened when its turn comes."""
        for number, file in enumerate(self.files):
            with open_media(file, self.limits) as container:
                decoded = decode_stream(container, picture_stream(container), file)
                found = next(decoded, None)
                if found is None:
                    raise MediaError("damaged", f"{file}: no picture in this file")
                yield number / self.rate, found[1]
