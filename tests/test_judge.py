"""Asking a model about clips: views are averaged, streams that nobody can use are named, gaps are no way to a score."""

import numpy as np
import pytest
import torch

from affekt.data.decode import Window
from affekt.data.errors import DataError
from affekt.finetune.judge import judge_clips

WINDOW = Window(num_frames=8, frame_stride=4, mel_frames=64)


class Listener:
    """Says how loud a window is, and nothing of a clip without sound; `deaf_to` names clips it answers NaN for."""

    window, streams = WINDOW, "both"

    def __init__(self, *deaf_to):
        self.deaf_to, self.said = deaf_to, {}

    def __call__(self, batch):
        logits = torch.full((len(batch.ids), 2), float("nan"))
        for row, clip in enumerate(batch.ids):
            if batch.has_audio[row] and clip not in self.deaf_to:
                logits[row] = torch.tensor([0.0, 10 * batch.audio[row].std()])
                self.said.setdefault(clip, []).append(logits[row].double())
        return {"logits": logits}


def test_views_are_averaged_as_probabilities_and_each_clip_has_one_answer(tiny_shards):
    index, judge = tiny_shards(12, seconds=1.6), Listener()
    judged = judge_clips(judge, index, range(12), windows=3, batch_size=5)
    assert judged.ids == [sample.id for sample in index.samples] and not judged.unread
    for clip, logits in zip(judged.ids, judged.logits):
        views = torch.stack(judge.said[clip])
        assert len(views) == 3
        np.testing.assert_allclose(np.exp(logits), views.softmax(1).mean(0).numpy(), atol=1e-9)


def test_clips_without_a_stream_of_use_are_named_and_left_out(tiny_shards):
    index = tiny_shards(12, streams="mixed", seconds=1.6)
    judged = judge_clips(Listener(), index, range(12), windows=1)
    silent = {sample.id for sample in index.samples if not sample.has_audio}
    assert silent and set(judged.unread) == silent and set(judged.ids) == {s.id for s in index.samples} - silent
    assert set(judged.unread.values()) == {"no stream that the model knows"}


def test_a_model_that_answers_nan_for_some_is_refused(tiny_shards):
    index = tiny_shards(12, seconds=1.6)
    bad = index.samples[7].id
    with pytest.raises(DataError, match=f"clip {bad}: the model answers NaN, though not for"):
        judge_clips(Listener(bad), index, range(12), windows=1, batch_size=4)
