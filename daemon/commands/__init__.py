"""The command line: ``xdit-sidecar …``. One module per command group."""
