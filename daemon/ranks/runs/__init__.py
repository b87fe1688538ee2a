"""What a rank computes for each kind of job, one turn after another."""
