"""What child processes of ours get to know of our environment."""

from sia_events.shared.environment import plain
from sia_events.shared.providers import BUILT_IN


def test_no_key_of_a_provider_is_handed_to_a_child():
    keys = {str(row["key_env"]): "secret" for row in BUILT_IN.values() if "key_env" in row}
    own = {"SIA_GATEWAY_SECRET": "secret", "SIA_NATS_URL": "nats://me:secret@host", "AWS_SECRET_ACCESS_KEY": "secret"}
    assert keys
    assert plain({**keys, **own, "MY_OWN_KEY": "secret"}) == {}


def test_what_says_how_programs_run_is():
    here = {"PATH": "/bin", "HOME": "/home/me", "LC_ALL": "C", "SIA_HOME": "/data", "OMP_NUM_THREADS": "1"}
    assert plain(here) == here
