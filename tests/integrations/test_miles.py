"""miles, from a checkout that MOE_UPGRPO_MILES names, on CPUs."""

from tests.integrations.slime_checks import StackChecks


class TestMiles(StackChecks):
    stack = "miles"
    # Their conftest imports SGLang.
    own_tests_flags = ("--noconftest",)
    name_of_own_tests = (
        "tests/fast/backends/training_utils/loss/test_training_logprob_reuse.py "
        "tests/fast/backends/training_utils/loss/test_opd.py "
        "tests/fast/backends/training_utils/test_replay_data.py "
        "tests/fast/backends/training_utils/test_ppo_ratio_numerics.py "
        "tests/fast/utils/test_replay_base.py",
    )
