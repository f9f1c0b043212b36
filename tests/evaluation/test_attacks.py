import pytest

from unembed.decoding import STRATEGIES, find_strategy
from unembed.errors import ConfigError
from unembed.evaluation.attacks import ALL, Attack, name_attacks, parse_attack


def test_an_attack_as_text():
    assert parse_attack("greedy") == Attack("greedy")
    assert parse_attack(" euler:steps=8:temperature=0.5", 3) == Attack(
        "euler", 8, 0, {"temperature": "0.5"}
    )
    assert parse_attack("guided:encoder_calls=300", 3) == Attack("guided", 3, 300)


def test_guidance_has_a_first_and_a_last_strength():
    guided = parse_attack("greedy:guidance=0/1.5:steps=4")
    assert guided == Attack("greedy", 4, guidance=(0.0, 1.5))
    assert guided.arguments(None)["guidance"] == (0.0, 1.5)
    assert list(name_attacks([guided, "greedy"], None)) == [
        "greedy:steps=4:guidance=0/1.5",
        "greedy",
    ]
    for wrong in ("greedy:guidance=1", "greedy:guidance=a/b"):
        with pytest.raises(ConfigError, match="FIRST/LAST"):
            parse_attack(wrong)


@pytest.mark.parametrize("text", ["a:b", "a:=2", "a:steps=", "a:steps=x", "a:steps=-1", "a:"])
def test_what_is_no_attack_is_refused(text):
    with pytest.raises(ConfigError, match="--strategies"):
        parse_attack(text)


def test_what_repetition_costs_is_a_setting_of_an_attack():
    attack = parse_attack("greedy:repetition=0.5")
    assert attack == Attack("greedy", repetition=0.5)
    assert attack.arguments(None)["repetition"] == 0.5
    assert list(name_attacks([attack, "greedy"], None)) == ["greedy:repetition=0.5", "greedy"]
    with pytest.raises(ConfigError, match=r"number of repetition .* found often"):
        parse_attack("greedy:repetition=often")


def test_one_attack_is_the_inverter_and_several_are_themselves():
    assert name_attacks("greedy", 4) == {"inverter": Attack("greedy", 4)}
    assert name_attacks(["greedy"], None) == {"inverter": Attack("greedy")}
    found = name_attacks(["greedy", Attack("guided", 8, 50, {"beam": 3})], 4)
    assert list(found) == ["greedy", "guided:steps=8:encoder_calls=50:beam=3"]
    assert found["greedy"].steps == 4


def test_the_encoder_is_for_those_who_may_call_it():
    assert Attack("greedy").arguments("encoder") == {"strategy": "greedy", "steps": None}
    asking = Attack("guided", 8, 50, {"beam": 3}).arguments("encoder")
    assert asking == {
        "strategy": "guided",
        "steps": 8,
        "options": {"beam": 3},
        "encoder": "encoder",
        "encoder_calls": 50,
    }
    assert Attack("guided", 8, 50).threat_model == "vector + encoder"


def test_all_is_every_registered_strategy_with_options_it_knows():
    attacks = name_attacks("all", 8)
    assert list(attacks) == list(ALL)
    assert {attack.strategy for attack in attacks.values()} == set(STRATEGIES)
    for attack in attacks.values():
        needs = find_strategy(attack.strategy, **attack.options).needs_encoder
        assert needs == (attack.encoder_calls > 0)
        assert not needs or attack.limit, "calls are dear"
    assert attacks["greedy"].steps == 8 and attacks["greedy:steps=32"].steps == 32


@pytest.mark.parametrize("limit", ["0", "-3", "few"])
def test_a_limit_is_a_number_from_one(limit):
    with pytest.raises(ConfigError, match="a number of limit"):
        parse_attack(f"greedy:limit={limit}")
