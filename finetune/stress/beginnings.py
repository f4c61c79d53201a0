"""Clips as if they ended early."""

from affekt.data.shards import ShardIndex


class Beginnings(ShardIndex):
    """An index whose clips are cut after this share of their length: views lie within what is left, the last picture
    stays and the sound is silent after it, as with any clip that is too short."""

    def __init__(self, index: ShardIndex, share: float):
        super().__init__(index.root, index.header, index.samples.beginnings(share), index.fingerprint)
        self.whole, self.share = index, share

    def __reduce__(self):
        return Beginnings, (self.whole, self.share)
