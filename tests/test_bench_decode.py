"""The parts of the speed benchmarks that measure nothing: requests, ratios, the report."""

import math

from bench.decode import Figures, Plan, end_time, first_times, ragged, rate, ratio_rows, replace_section, table
from bench.peers import Workload, make_requests
from bench.serve import FLOOD, percentile
from bench.serve import Plan as ServePlan
from studytiny import Tokenizer


def answer(first: float, done: float, tokens: int = 10, refused: str = "") -> dict:
    return {"first": first, "done": done, "tokens": tokens, "refused": refused}


def test_prompts_have_the_tokens_asked_and_change_with_the_seed() -> None:
    tokenizer = Tokenizer(chr(0x4E00 + number) for number in range(100))
    workload = Workload([8, 64, 120], [16, 17, 18], arrivals=[0.0, 0.1, 0.2], callers=["a", "b", "c"])
    requests = make_requests(workload, tokenizer, 1)
    assert [len(request.prompt) for request in requests] == [8, 64, 120]
    assert [(request.new_tokens, request.arrival, request.caller) for request in requests] == [
        (16, 0.0, "a"),
        (17, 0.1, "b"),
        (18, 0.2, "c"),
    ]
    assert requests == make_requests(workload, tokenizer, 1)
    assert requests[1].text != make_requests(workload, tokenizer, 2)[1].text


def test_every_engine_gets_the_same_ragged_list_that_fits_the_window() -> None:
    workload = ragged(32, 128)
    assert workload == ragged(32, 128)
    assert min(workload.prompts) >= 8 and min(workload.replies) >= 16 and max(workload.replies) <= 128
    assert max(a + b for a, b in zip(workload.prompts, workload.replies, strict=True)) <= 256


def test_every_column_of_the_table_is_measured() -> None:
    assert set(Plan().workloads()) == set(Plan().headings())


def test_rate_counts_from_the_start_to_the_last_token() -> None:
    workload = Workload([8, 8], [10, 10], arrivals=[0.0, 3.0])
    answers = [answer(0.1, 2.0), answer(0.1, 1.0)]
    assert end_time(workload, answers) == 4.0
    assert rate(workload, answers) == 5.0


def test_refused_conversations_have_no_first_token() -> None:
    assert first_times([answer(0.1, 1.0), {**answer(0, 0, 0, "忙"), "first": None}]) == [0.1]


def test_ratio_says_how_many_times_as_fast_also_where_less_is_better() -> None:
    figures = Figures()
    for name, one, first in (("studytiny-int8", 300.0, 5.0), ("llama.cpp-q8_0", 100.0, 10.0)):
        figures.add(name, "one", one)
        figures.add(name, "first", first)
    rows = ratio_rows(["studytiny-int8", "llama.cpp-q8_0"], {"one": "", "first": ""}, figures)
    assert rows == [["本项目 int8 : llama.cpp", "3.00", "2.00"]]


def test_ratio_takes_the_fastest_row_of_a_peer() -> None:
    figures = Figures()
    for name, value in (("studytiny-int8", 300.0), ("ctranslate2-float32", 50.0), ("ctranslate2-int8", 150.0)):
        figures.add(name, "one", value)
    rows = ratio_rows(["studytiny-int8", "ctranslate2-float32", "ctranslate2-int8"], {"one": ""}, figures)
    assert rows == [["本项目 int8 : CTranslate2", "2.00"]]


def test_a_cell_gives_median_and_spread() -> None:
    figures = Figures()
    for value in (90.0, 300.0, 120.0):
        figures.add("x", "one", value)
    assert figures.cell("x", "one") == "120（90–300）"
    assert figures.cell("x", "first") == "—"


def test_a_section_replaces_only_itself() -> None:
    document = replace_section(replace_section("# 速度\n", "decode", "甲", "一"), "serve", "乙", "二")
    again = replace_section(document, "decode", "甲", "三")
    assert "一" not in again
    assert again == document.replace("一", "三")
    assert again.index("三") < again.index("二")


def test_table_is_markdown() -> None:
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_percentile_is_one_of_the_values() -> None:
    assert percentile([4, 1, 3, 2], 0.5) == 2
    assert percentile([4, 1, 3, 2], 0.95) == 4
    assert math.isnan(percentile([], 0.5))


def test_the_flood_stands_in_front_of_the_visitors() -> None:
    plan = ServePlan()
    workload = plan.flooded()
    assert workload.callers.count(FLOOD) == plan.flood
    assert len(set(workload.callers)) == plan.visitors + 1
    assert max(workload.arrivals[: plan.flood]) < min(workload.arrivals[plan.flood :])
    assert workload.prompts[plan.flood :] == plan.together().prompts
