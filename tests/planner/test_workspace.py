"""Working sets grow with what they consist of."""

import dataclasses

import pytest

from models.presets import preset
from piperjax.planner import workspace
from piperjax.planner.kept import Share, kept_bytes, message_bytes
from piperjax.planner.storage import storage
from piperjax.planner.workspace import Backend

TINY = preset("tiny")
STORED = storage(TINY, (4,), pipe=1, data=1, expert=1, dtype="float32")


def backward(kind, *, splits=False, widens=True, dtype="float32", memory_mode="layer", **share):
    backend = Backend(widens=widens, share=Share(**{"sequences": 1, "seq_len": 64, **share}, dtype=dtype))
    layer = TINY.kinds[kind]
    passes = dict(splits=splits, memory_mode=memory_mode)
    return workspace.layer_backward(TINY.d_model, layer, STORED.layers[kind], backend, **passes)


def weight_gradient(kind, **share):
    backend = Backend(widens=True, share=Share(**{"sequences": 1, "seq_len": 64, **share}, dtype="float32"))
    layer = TINY.kinds[kind]
    return workspace.weight_gradient(TINY.d_model, layer, STORED.layers[kind], backend, "layer")


def test_scores_of_attention_are_quadratic_up_to_the_longest_whole_sequence_and_linear_beyond():
    lengths = (256, 512, 1024, 2048, 4096)
    shortest, short, whole, long, longest = (backward("dense", seq_len=S).total for S in lengths)
    assert (whole - short) / (short - shortest) > 3
    assert 1.9 < longest / long < 2


def test_rows_of_dispatch_follow_the_devices_that_share_experts():
    alone, shared = (backward("moe", sequences=8, seq_len=16, expert=expert).dispatch for expert in (1, 4))
    assert shared == pytest.approx(4 * alone)  # Dropless: every device has room for all that could come.


def test_rows_that_crossed_once_lie_beside_their_messages():
    where = dict(sequences=8, expert=4, nodes=2, dispatch="halo2_dedup")
    share, ffn, D = Share(seq_len=64, dtype="float32", **where), TINY.kinds["moe"].ffn, TINY.d_model
    rows = share.buffers(ffn)
    messages = rows.arrived * message_bytes(D, ffn, share)
    assert backward("moe", **where).dispatch == 3 * rows.experts * D * 4 + messages


def test_what_was_kept_between_the_matrices_of_experts_is_read_where_it_is():
    layer, products, stash = (
        backward("moe", sequences=8, memory_mode=mode).total for mode in ("layer", "products", "stash")
    )
    ffn = TINY.kinds["moe"].ffn
    hidden = Share(sequences=8, seq_len=64, dtype="float32").rows(ffn) * ffn.d_ff * 4
    assert (layer - products, layer - stash) == (2 * hidden, 3 * hidden)


def test_with_one_matrix_up_its_gradient_waits_for_the_backward_of_attention():
    """Scores of long sequences are the most; made again are what it made and what was made of that."""
    moe = TINY.kinds["moe"]
    layer = dataclasses.replace(moe, ffn=dataclasses.replace(moe.ffn, num_matrices=2))
    share = Share(sequences=1, seq_len=1024, dtype="float32")
    total = {
        mode: workspace.layer_backward(
            TINY.d_model,
            layer,
            STORED.layers["moe"],
            Backend(widens=True, share=share),
            splits=False,
            memory_mode=mode,
        ).total
        for mode in ("layer", "products", "stash")
    }
    hidden = share.rows(layer.ffn) * layer.ffn.d_ff * 4
    assert (total["layer"] - total["products"], total["layer"] - total["stash"]) == (0, hidden)


def test_an_input_gradient_needs_less_than_a_backward():
    assert backward("moe", splits=True).total < backward("moe").total


def test_every_chunk_of_the_tokens_has_gradients_of_its_experts():
    experts = 4 * STORED.layers["moe"].experts
    for phase in (backward, weight_gradient):
        two, three, four = (phase("moe", seq_len=240, dispatch_chunks=n).total for n in (2, 3, 4))
        steps = (three - two, four - three)
        assert steps == pytest.approx((experts, experts), rel=1e-4)  # And a count for each expert.
        assert two - phase("moe", seq_len=240).total >= 0.999 * experts
    assert backward("moe", splits=True, dispatch_chunks=4) == backward("moe", splits=True)
    assert weight_gradient("dense", dispatch_chunks=4) == weight_gradient("dense")


def test_bfloat16_is_widened_on_simulated_devices_only():
    as_compiled, on_gpu = (backward("moe", dtype="bfloat16", widens=widens).total for widens in (True, False))
    assert on_gpu < 0.75 * as_compiled


def test_narrow_elements_leave_out_what_is_kept_in_float32():
    share = Share(sequences=2, seq_len=24, dtype="bfloat16")
    layer = TINY.kinds["dense"]
    count = workspace.narrow_elements(kept_bytes, TINY.d_model, layer, share, "layer")
    assert count == 2 * 24 * TINY.d_model  # The input alone.
    stash = kept_bytes(TINY.d_model, layer, share, "stash")
    narrow = 2 * workspace.narrow_elements(kept_bytes, TINY.d_model, layer, share, "stash")
    assert 0 < narrow < stash


def test_logits_are_there_three_times_in_float32():
    backend = Backend(widens=True, share=Share(sequences=2, seq_len=512, dtype="float32"))
    phase = workspace.head(64, 10_000, backend)
    assert 3 * 1024 * 10_000 * 4 <= phase.total < 3.1 * 1024 * 10_000 * 4
