"""One resident set of weights, worked on by several ranks at once: xfuser as the engine.

Order in a rank process: ``xfuser_repairs.load_xfuser`` (before anything else imports xfuser),
``process_group.join``, one ``ParallelContext.build`` per config, then forwards for as long as the
process lives.
"""
