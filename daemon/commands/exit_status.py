"""What the commands' exit statuses mean."""

HEALTHY = 0
FAILED = 1
USAGE = 2
NO_DAEMON = 3
