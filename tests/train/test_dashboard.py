"""Where values are shown, and that the page of charts finds them."""

import json
import re

from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.util import tensor_util

from lm import config as configs
from lm.experiment import Config
from lm.train.dashboard import compared, layout, tag

LOGGED = [
    *("loss", "bits_per_byte", "heldout_loss", "heldout_bits_per_byte", "heldout_loss/books", "learning_rate"),
    *("heldout_bits_per_byte/books", "tokens", "grad_norm", "param_norm", "update_norm", "update_ratio"),
    *("grad_norm/embedding", "update_ratio/layers_0-3", "clipped_share", "skipped_share", "skipped_steps"),
    *("attention_entropy", "attention_logit", "output_logit", "attention_entropy/layer_2", "attention_logit/layer_2"),
    *("rewinds", "tokens_per_second", "mfu", "step_seconds", "expected_step_seconds", "model_flops_per_second"),
    *("step_seconds/compute", "step_seconds/host", "memory_bytes", "expected_memory_bytes", "goodput/step"),
    *("goodput/lost", "goodput/restarts", "saves", "saves_failed", "saves_skipped"),
]


def charts() -> dict[str, list[str]]:
    """Names that each chart shows, of those that are logged."""
    [value] = layout().value
    found = layout_pb2.Layout.FromString(tensor_util.make_ndarray(value.tensor).item())
    return {
        chart.title: [name for name in LOGGED if any(re.match(p, tag(name)) for p in chart.multiline.tag)]
        for category in found.category
        for chart in category.chart
    }


def test_every_value_has_a_place_of_its_own() -> None:
    assert len({tag(name) for name in LOGGED}) == len(LOGGED)
    assert not [name for name in LOGGED if tag(name).startswith("8")]
    assert tag("what_nobody_knows") == "8 other/what_nobody_knows"


def test_the_first_four_answer_the_four_questions() -> None:
    first = sorted(tag(name) for name in LOGGED)[:4]
    assert [re.search(r"(\w+):", one)[1] for one in first] == ["learning", "healthy", "fast", "whole"]


def test_charts_show_what_they_are_called_after() -> None:
    found = charts()
    assert all(found.values()), found
    assert found["bits per byte"] == ["bits_per_byte", "heldout_bits_per_byte"]
    assert found["held-out bits per byte, by source"] == ["heldout_bits_per_byte/books"]
    assert found["update over weight"] == ["update_ratio/layers_0-3"]
    assert found["where they go"] == ["step_seconds/compute", "step_seconds/host"]
    assert found["goodput, and where the rest went"] == ["goodput/step", "goodput/lost"]
    assert found["restarts, rewinds"] == ["rewinds", "goodput/restarts"]


def test_what_is_compared_between_runs() -> None:
    config = Config()
    experiment, start = compared(configs.leaves(config), "first")
    content = hparams.parse_experiment_plugin_data(experiment.value[0].metadata.plugin_data.content)
    names = {info.name for info in content.hparam_infos}
    assert {"optim.learning_rate", "model.layers", "train.batch_size", "run.seed"} <= names
    assert "run.dir" not in names
    assert tag("heldout_bits_per_byte") in {info.name.tag for info in content.metric_infos}
    session = hparams.parse_session_start_info_plugin_data(start.value[0].metadata.plugin_data.content)
    assert session.group_name == "first"
    assert session.hparams["optim.learning_rate"].number_value == config.optim.learning_rate
    assert session.hparams["optim.decay_steps"].string_value == "none"
    assert json.loads(configs.to_json(config))["model"]["layers"] == session.hparams["model.layers"].number_value
