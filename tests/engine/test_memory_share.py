"""Who decides how much of a GPU's memory the runtime takes."""

import pytest

from flexjax.engine.machine import FORMER_VARIABLE, MEMORY_VARIABLE, claim_memory
from flexjax.fields import ConfigError


@pytest.mark.parametrize(
    ("environment", "share"),
    [({}, "0.7"), ({MEMORY_VARIABLE: "0.4"}, "0.4"), ({FORMER_VARIABLE: "0.3"}, "0.3")],
)
def test_the_environment_wins_over_the_configuration_and_only_one_name_is_left(monkeypatch, environment, share):
    assert environment_after_claim(monkeypatch, environment) == {MEMORY_VARIABLE: share}


def test_both_names_with_one_value_are_one_decision(monkeypatch):
    both = {MEMORY_VARIABLE: "0.5", FORMER_VARIABLE: "0.5"}
    assert environment_after_claim(monkeypatch, both) == {MEMORY_VARIABLE: "0.5"}


def test_two_values_are_an_error_that_names_both(monkeypatch):
    with pytest.raises(ConfigError, match="XLA_PYTHON_CLIENT_MEM_FRACTION is 0.3 and XLA_CLIENT_MEM_FRACTION is 0.5"):
        environment_after_claim(monkeypatch, {MEMORY_VARIABLE: "0.5", FORMER_VARIABLE: "0.3"})


def environment_after_claim(monkeypatch, environment):
    """What of both names is set after a share of 0.7 was asked for."""
    variables = dict(environment)
    monkeypatch.setattr("flexjax.engine.machine.os.environ", variables)
    claim_memory(0.7)
    return variables
