"""``python -m xdit_sidecar.daemon.keeper``: started by the broker, never by hand."""

import sys

from .process import main

sys.exit(main())
