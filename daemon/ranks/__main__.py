"""``python -m xdit_sidecar.daemon.ranks``: started by the broker, never by hand."""

import sys

from .fork_server import main

sys.exit(main())
