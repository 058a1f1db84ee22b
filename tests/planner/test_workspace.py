"""Working sets grow with what they consist of."""

from models.presets import preset
from piperjax.planner import workspace
from piperjax.planner.kept import Share
from piperjax.planner.storage import storage


def test_attention_without_fusion_is_quadratic_in_the_sequence():
    model = preset("tiny")
    stored = storage(model, (4,), pipe=1, data=1, expert=1, dtype="float32")
    layer = model.kinds["dense"]
    found = [
        sum(
            workspace.layer_backward(
                model.d_model,
                layer,
                Share(sequences=1, seq_len=seq_len, dtype="float32"),
                stored.layers["dense"],
                wide=True,
            )
        )
        for seq_len in (4096, 8192)
    ]
    assert 3.5 < found[1] / found[0] < 4
