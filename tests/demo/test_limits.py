import pytest

from unembed.demo.limits import RateLimiter, client_of, parse_rate
from unembed.errors import ConfigError


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_rate_limiter_a_full_bucket_is_spent_and_refilled():
    clock = Clock()
    limiter = RateLimiter(60, 60.0, clock)
    assert [limiter.take("a") for _ in range(60)] == [0] * 60
    assert limiter.take("a") == 1
    assert limiter.take("b") == 0, "another client has its own"
    clock.now = 0.5
    assert limiter.take("a") == 1, "a refusal costs nothing, so half a token is there"
    clock.now = 1.0
    assert limiter.take("a") == 0
    assert limiter.take("a", 30) == 30
    clock.now = 1000.0
    assert limiter.take("a", 60) == 0, "never more than full"
    assert limiter.take("a") == 1


def test_rate_limiter_what_costs_more_than_a_full_bucket_can_be_paid():
    limiter = RateLimiter(4, 4.0, Clock())
    assert limiter.take("a", 100) == 0
    assert limiter.take("a", 100) == 4


def test_rate_limiter_only_so_many_clients_are_remembered(monkeypatch):
    monkeypatch.setattr("unembed.demo.limits._CLIENTS", 3)
    limiter = RateLimiter(1, 1.0, Clock())
    assert [limiter.take(name) for name in "abcd"] == [0] * 4
    assert limiter.take("d") == 1
    assert limiter.take("a") == 0, "forgotten"


@pytest.mark.parametrize(
    ("rate", "parsed"),
    [("120/minute", (120, 60.0)), ("5/second", (5, 1.0)), ("9/hour", (9, 3600.0))],
)
def test_parse_rate_rates_are_read(rate, parsed):
    assert parse_rate(rate) == parsed


@pytest.mark.parametrize("rate", ["", "120", "0/minute", "-1/second", "1/day", "1.5/second"])
def test_parse_rate_other_rates_are_refused(rate):
    with pytest.raises(ConfigError, match="a rate such as 120/minute"):
        parse_rate(rate)


def test_client_of_a_client_is_an_address_or_a_subscriber_network():
    assert client_of("192.0.2.7") == "192.0.2.7"
    assert client_of("::ffff:192.0.2.7") == "192.0.2.7"
    assert client_of("2001:db8:1:2:3::4") == client_of("2001:db8:1:2:ffff::9")
    assert client_of("2001:db8:1:2::4") != client_of("2001:db8:1:3::4")
    assert client_of("unknown") == "unknown"
