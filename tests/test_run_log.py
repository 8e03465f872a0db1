"""The log of a run: whole lines, nothing twice after a resume, and a kill costs at most the line being written."""

import sys

import pytest

from studytiny import UserError
from train.run_log import METRICS_FILE, PROMPTS, SAMPLES_FILE, RunLog, read_metrics, read_samples

REPLIES = [("你好", "你好呀\u2028第二行"), ("再见", "")]


def log_steps(log, steps):
    for step in steps:
        log.training(
            step=step,
            epoch=0,
            seconds=step / 2,
            tokens=100 * step,
            loss=5.0,
            learning_rate=1e-3,
            tokens_per_second=200.0,
        )


def steps_of(lines):
    return [line["step"] for line in lines]


def test_what_is_logged_is_read_again(tmp_path):
    log = RunLog(tmp_path)
    log_steps(log, [10, 20])
    log.measurement(step=20, epoch=1, seconds=10.0, bits_per_char=4.5)
    log.samples(step=20, stage=1, replies=REPLIES)
    training, measurements = read_metrics(tmp_path)  # before close: each line is on the disk at once
    assert training[1] == {
        "kind": "training",
        "step": 20,
        "epoch": 0,
        "seconds": 10.0,
        "tokens": 2000,
        "loss": 5.0,
        "learning_rate": 1e-3,
        "tokens_per_second": 200.0,
    }
    assert measurements == [{"kind": "measurement", "step": 20, "epoch": 1, "seconds": 10.0, "bits_per_char": 4.5}]
    assert read_samples(tmp_path) == [{"step": 20, "stage": 1, "replies": [list(pair) for pair in REPLIES]}]
    log.close()


def test_folder_without_a_log_has_no_lines(tmp_path):
    assert read_metrics(tmp_path) == ([], [])
    assert read_samples(tmp_path) == []


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_torn_last_line_of_a_killed_run_is_passed_over(tmp_path, cut):
    log = RunLog(tmp_path)
    log_steps(log, [10, 20])
    log.samples(step=20, stage=1, replies=REPLIES)
    log.close()
    for name in (METRICS_FILE, SAMPLES_FILE):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-cut])
    assert steps_of(read_metrics(tmp_path)[0]) == [10]
    assert read_samples(tmp_path) == []


@pytest.mark.parametrize("cut", range(12))
def test_line_cut_inside_a_character_can_be_read_past(tmp_path, cut):
    whole = '{"step": 1, "stage": 1, "replies": [["好", "好"]]}\n'.encode()
    (tmp_path / SAMPLES_FILE).write_bytes(whole + whole[: len(whole) - cut])
    assert len(read_samples(tmp_path)) == (2 if cut == 0 else 1)


def test_lines_that_are_none_of_ours_are_passed_over(tmp_path):
    log = RunLog(tmp_path)
    log_steps(log, [10])
    log.close()
    foreign = '[1]\nnot json\n{"kind": "training"}\n{"kind": "training", "step": "ten"}\n\n'
    with (tmp_path / METRICS_FILE).open("a", encoding="utf-8") as file:
        file.write(foreign)
    (tmp_path / SAMPLES_FILE).write_text('{"step": 1, "stage": 1, "replies": ["你好"]}\n', encoding="utf-8")
    assert steps_of(read_metrics(tmp_path)[0]) == [10]
    assert read_samples(tmp_path) == []


def test_resume_drops_the_lines_of_steps_that_run_again(tmp_path):
    log = RunLog(tmp_path)
    log_steps(log, [10, 20, 30])
    log.measurement(step=30, epoch=0, seconds=15.0, bits_per_char=4.0)
    log.samples(step=10, stage=1, replies=REPLIES)
    log.samples(step=30, stage=2, replies=REPLIES)
    log.close()
    with (tmp_path / METRICS_FILE).open("ab") as file:
        file.write(b'{"kind": "training", "st')  # the kill

    log = RunLog(tmp_path, resume_step=20)
    log_steps(log, [25, 30])
    log.close()
    training, measurements = read_metrics(tmp_path)
    assert steps_of(training) == [10, 20, 25, 30]
    assert measurements == []
    assert [line["stage"] for line in read_samples(tmp_path)] == [1]


def test_fresh_run_starts_with_empty_files(tmp_path):
    log = RunLog(tmp_path)
    log_steps(log, [10])
    log.close()
    RunLog(tmp_path).close()
    assert read_metrics(tmp_path) == ([], [])
    assert (tmp_path / SAMPLES_FILE).read_bytes() == b""


def test_prompts_are_twenty_different_ones():
    assert len(PROMPTS) == len(set(PROMPTS)) == 20


def test_without_tensorboard_one_sentence_says_how_to_get_it(tmp_path, monkeypatch):
    log = RunLog(tmp_path)
    log_steps(log, [10])
    log.close()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        RunLog(tmp_path, tensorboard=True)
    assert steps_of(read_metrics(tmp_path)[0]) == [10]  # nothing was emptied by the attempt


def test_tensorboard_reads_what_was_written_for_it(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume_step, steps in ((0, [10, 20, 30]), (20, [25])):
        log = RunLog(tmp_path, resume_step, tensorboard=True)
        log_steps(log, steps)
        log.measurement(step=steps[-1], epoch=0, seconds=1.0, bits_per_char=4.0)
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["bits_per_char", "learning_rate", "loss", "tokens_per_second"]
    assert [event.step for event in events.Scalars("loss")] == [10, 20, 25]
