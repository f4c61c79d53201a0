"""All that is varied of a training batch on its way into the model, in the order in which it is done."""

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from affekt.data.augment import Augment
from affekt.data.batch import Batch, Streams
from affekt.data.errors import SettingsError
from affekt.data.settings import Settings
from affekt.data.transforms import Inputs, Preprocess
from affekt.finetune.training.erasing import Erasing
from affekt.finetune.training.mixing import Mixed, Mixing, mix
from affekt.finetune.training.sound import Sound
from affekt.finetune.training.streams import StreamDropout, drop_streams


class Varied(Settings):
    """What is varied after decoding; `data.augment` has what is varied before. Nothing is by default."""

    sound: Sound = Field(Sound(), description="noise, tempo, pitch, masks")
    erasing: Erasing = Field(Erasing(), description="a box of noise in the pictures")
    mixing: Mixing = Field(Mixing(), description="Mixup and CutMix, of both streams alike")
    streams: StreamDropout = Field(StreamDropout(), description="whole streams hidden")

    def check(self, streams: Streams, augment: Augment) -> None:
        """Raises SettingsError for what is varied of a stream that is not used."""
        of_pictures = {
            "varied.erasing": self.erasing.share,
            "data.augment.crop_area": augment.crop_area,
            "data.augment.rand_augment": augment.rand_augment,
            "data.augment.flip": augment.flip,
        }
        of_sound = {"varied.sound": self.sound != Sound(), "data.augment.roll": augment.roll}
        idle = [name for name, on in (of_pictures if streams == "audio" else {}).items() if on]
        idle += [name for name, on in (of_sound if streams == "video" else {}).items() if on]
        if streams != "both" and self.streams != StreamDropout():
            idle.append("varied.streams")
        if idle:
            raise SettingsError(f"{', '.join(idle)}: of no effect where the streams used are {streams}; leave it out")

    def view(
        self, batch: Batch, preprocess: Preprocess, device: torch.device | str, groups: Tensor | None = None
    ) -> tuple[Inputs, Mixed | None]:
        """A batch from the loader as the model is to see it, and who was mixed with whom, None where none are.

        Draws from `batch.keys` alone. `groups` (B,) on the device: clips of different ones are not mixed.
        """
        keys = batch.keys.tolist()  # while they are on the host, so that nothing has to wait
        batch = batch.to(device)
        if batch.audio is not None:
            batch = replace(batch, audio=self.sound.waveform(batch.audio, batch.audio_valid, keys))
        inputs = self.erasing.erase(self.sound.log_mel(preprocess(batch), keys), keys)
        mixed = None
        if self.mixing.mixup or self.mixing.cutmix:
            inputs, mixed = mix(inputs, keys, self.mixing, batch.repeats, groups)
        return drop_streams(inputs, keys, self.streams), mixed
