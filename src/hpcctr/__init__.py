"""hpcctr starts a program in an OCI container as the caller's own process.

A launch, in the order its nouns appear::

    argv ── client ──> LaunchRequest ── socket ──> engine
                                                     │  Caller       who asks          context.py   (kernel facts)
                                                     │  StoredImage  which image       image/       (store)
                                                     │  HostEdits    what the node adds host/       (site)
                                                     │  Grant        what is allowed   policy/
                                                     │  OCI spec     how it is built   spec/        (pure)
                                                     ▼  NodeContainer  built by containerd, created, never started
    client <── reply 1: environment, entrypoint, directories to carry ──┤
    enter  <── reply 2: descriptor of the mount namespace ──────────────┘
      the caller's process walks in and becomes the command

``launch.py`` tells the engine's half as a story, ``client/run.py`` the caller's half. ``engine/`` and ``enter/`` are
all that holds privilege; their READMEs are the threat model.
"""

__version__ = "0.1.0"
