"""``python -m xdit_sidecar.daemon``: the command line, without an installed script."""

import sys

from .commands.main import main

sys.exit(main())
