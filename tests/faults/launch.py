"""Run the daemon with other values of constants of its module, from $LAUNCH_CONSTANTS (JSON); see tools.launch."""
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import xxl_executor  # noqa: E402

vars(xxl_executor).update(json.loads(os.environ.pop("LAUNCH_CONSTANTS", "{}")))
sys.exit(xxl_executor.main())
