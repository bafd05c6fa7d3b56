"""miles, from a checkout that MOE_UPGRPO_MILES names, on CPUs."""

from tests.integrations.slime_checks import StackChecks


class TestMiles(StackChecks):
    stack = "miles"
    # Its cross entropy is Megatron's fused one, whose gradient is rounded to bfloat16
    # (fused_cross_entropy.py:82).
    tolerance = 2**-8
    # Their conftest imports SGLang.
    own_tests_flags = ("--noconftest",)
    name_of_own_tests = (
        "tests/fast/backends/training_utils/loss/test_training_logprob_reuse.py "
        "tests/fast/backends/training_utils/loss/test_opd.py "
        "tests/fast/backends/training_utils/test_replay_data.py "
        "tests/fast/utils/test_replay_base.py",
    )
