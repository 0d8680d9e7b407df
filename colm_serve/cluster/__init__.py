"""The composition root: Ray actors, their controller, and starting and stopping the lot."""

import os
import sys

# Ray reads these while it is being imported, and halves of a cluster that disagree about the
# first fail late and obscurely: so it is set here, before any module of ours imports Ray.
if "ray" not in sys.modules:
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
