"""The supervisor's rules; its processes are tested end to end."""

import pytest

from server.errors import StartupError
from server.settings import Settings, settings_from_text, settings_to_text
from server.supervisor import FIRST_DELAY_S, LAST_DELAY_S, SHORT_LIFE_S, Delay, require_linux


def test_several_processes_need_linux() -> None:
    require_linux("linux")
    with pytest.raises(StartupError, match="--workers above 1 needs Linux, this is darwin; use --workers 1"):
        require_linux("darwin")


def test_process_that_dies_again_and_again_waits_longer_each_time() -> None:
    delay, now, delays = Delay(0.0), 0.0, []
    for _ in range(12):
        now += 0.5
        delays.append(delay.next_s(now))
        now += delays[-1]
    assert delays[:3] == [FIRST_DELAY_S, 2 * FIRST_DELAY_S, 4 * FIRST_DELAY_S]
    assert delays[-1] == LAST_DELAY_S


def test_process_that_lived_long_is_replaced_soon() -> None:
    delay = Delay(0.0)
    for now in (0.0, 1.0, 2.0):
        delay.next_s(now)
    assert delay.next_s(2.0 + 2 * SHORT_LIFE_S) == FIRST_DELAY_S


def test_settings_reach_the_processes_unchanged() -> None:
    settings = Settings(workers=3, port=0, default_timeout_s=1.5)
    assert settings_from_text(settings_to_text(settings)) == settings
