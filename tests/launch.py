"""Run the daemon with other values of constants of its module, from $LAUNCH_CONSTANTS (JSON); see
conftest.launch."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import xxl_executor  # noqa: E402

vars(xxl_executor).update(json.loads(os.environ.pop("LAUNCH_CONSTANTS", "{}")))
sys.exit(xxl_executor.main())
