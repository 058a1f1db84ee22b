"""Tests of records, their lines, and metrics.jsonl."""

import dataclasses
import io
import json
import math

import numpy as np
import pytest

from piperjax.training.metrics import (
    MetricsFile,
    Printer,
    Work,
    gib,
    is_finite,
    load_table,
    read_metrics,
    si,
    step_line,
    step_record,
    validation_line,
)
from piperjax.training.state import StepMetrics

WORK = Work(tokens=2048, flop=4e9, num_devices=8, peak_flop_per_second=1e10)


def make_metrics(**changes):
    values = dict(
        loss=np.float32(2.5),
        aux_loss=np.float32(0.0125),
        grad_norm=np.float32(0.75),
        learning_rate=np.float32(3e-4),
        num_tokens=np.float32(2040),
        load=np.array([[4, 0, 2, 2], [2, 2, 2, 2]], np.float32),
        overflow=np.float32(4),
        stop=np.int32(0),
    )
    return StepMetrics(**(values | changes))


def test_all_to_all_bytes_by_level_are_in_record_and_line():
    work = dataclasses.replace(WORK, all_to_all_bytes={"self": 1024.0, "node": 3 * 2.0**20})
    record = step_record(make_metrics(), step=7, step_seconds=0.5, work=work)
    assert record["all_to_all_bytes"] == {"self": 1024, "node": 3 * 2**20}
    assert "all-to-all 1.0 KiB self, 3.0 MiB node" in step_line(record, num_steps=10)


def test_record_drawn_out():
    record = step_record(make_metrics(), step=7, step_seconds=0.5, work=WORK)
    record = json.loads(json.dumps(record))
    assert record.pop("load_imbalance") == [2.0, 1.0]
    assert record == pytest.approx(
        {
            "step": 7,
            "loss": 2.5,
            "aux_loss": 0.0125,
            "grad_norm": 0.75,
            "learning_rate": 3e-4,
            "step_seconds": 0.5,
            "tokens_per_second": 4096.0,
            "flop_per_second_per_device": 1e9,
            "dropped_fraction": 0.25,
            "mfu": 0.1,
        }
    )
    assert step_line(record | {"load_imbalance": [2.0, 1.0]}, num_steps=300) == (
        "step   7/300 | loss 2.5000 | aux 0.0125 | grad 0.750 | lr 3.00e-04 | 0.5 s | 4.1k tokens/s | "
        "0.001 TFLOP/s/device | MFU 10.0% | load 2.00x mean | dropped 25.0%"
    )


def test_seconds_stand_beside_those_predicted():
    work = dataclasses.replace(WORK, predicted_step_seconds=0.45678)
    record = step_record(make_metrics(), step=7, step_seconds=0.5, work=work)
    assert record["predicted_step_seconds"] == 0.45678
    assert "| 0.5 s (predicted 0.457) |" in step_line(record, num_steps=300)
    assert "predicted_step_seconds" not in step_record(make_metrics(), step=7, step_seconds=0.5, work=WORK)


def test_what_is_not_known_is_not_printed():
    work = Work(tokens=1, flop=1.0, num_devices=1, peak_flop_per_second=0.0)
    record = step_record(make_metrics(load=np.zeros((0, 0))), step=1, step_seconds=1.0, work=work)
    line = step_line(record, num_steps=5)
    assert "mfu" not in record and "MFU" not in line and "load" not in line and "memory" not in line
    line = step_line(record | {"peak_memory_bytes": 3 * 2**30}, num_steps=5)
    assert line.endswith("memory 3.00 GiB")


def test_validation_line_shows_what_order_is_worth():
    record = {"step": 9, "validation_loss": 1.5, "bits_per_byte": 2.164, "unigram_entropy": 3.155}
    expected = "step 9 validation loss 1.5000 (2.164 bits per byte; unigram entropy 3.1550)"
    assert validation_line(record) == expected


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_overflow_is_seen(name, value):
    assert is_finite(make_metrics()) and not is_finite(make_metrics(**{name: value}))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.25, "0.25"), (999, "999"), (12_345, "12.3k"), (2.82e6, "2.82M"), (5e9, "5G"), (1.7e12, "1.7T")],
)
def test_decimal_units(value, text):
    assert si(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(12, "12 B"), (2048, "2.0 KiB"), (10.8 * 2**20, "10.8 MiB"), (2**40, "1.0 TiB")]
)
def test_binary_units(value, text):
    assert gib(value) == text


def test_file_continues_without_a_step_twice(tmp_path):
    metrics = MetricsFile(tmp_path, resume_step=0)
    for step in range(1, 6):
        metrics.write({"step": step, "loss": 1.0 / step})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "los')  # a process killed in the middle of a line
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    metrics = MetricsFile(tmp_path, resume_step=3)
    metrics.write({"step": 4, "loss": 0.0})
    metrics.close()
    assert [(record["step"], record["loss"]) for record in read_metrics(tmp_path)][2:] == [
        (3, 1 / 3),
        (4, 0.0),
    ]


def test_a_foreign_file_is_left_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("my notes\nmore notes\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl line 1 is not a metrics record; move the file away"):
        MetricsFile(tmp_path, resume_step=0)
    assert path.read_text() == "my notes\nmore notes\n"


def test_reading_where_nothing_was_written(tmp_path):
    assert read_metrics(tmp_path) == []


def test_plain_printer_prints_lines_only():
    stream = io.StringIO()
    printer = Printer("plain", num_steps=3, stream=stream)
    printer.line("hello")
    printer.advance({"step": 1, "loss": 1.0})
    printer.close()
    assert stream.getvalue() == "hello\n"


def test_auto_is_plain_where_there_is_no_terminal(capsys):
    printer = Printer("auto", num_steps=3)
    printer.line("hello")
    printer.advance({"step": 1, "loss": 1.0})
    printer.close()
    assert capsys.readouterr() == ("hello\n", "")


def test_bar_stands_below_the_lines(capsys):
    printer = Printer("bar", num_steps=4)
    printer.line("hello")
    assert capsys.readouterr().err == ""
    printer.advance({"step": 3, "loss": 1.25})
    printer.line("below")
    printer.close()
    output = capsys.readouterr()
    assert output.out == "below\n" and "2/4" in output.err


def test_silent_printer_prints_nothing(capsys):
    printer = Printer("none", num_steps=4)
    printer.line("hello")
    printer.close()
    assert capsys.readouterr() == ("", "")


def test_load_table_for_plots():
    records = [{"step": 1, "load_imbalance": [2.0, 1.0]}, {"step": 1, "validation_loss": 2.0}]
    np.testing.assert_array_equal(load_table(records), [[2.0, 1.0]])
