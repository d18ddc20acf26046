"""Where weights come from (`hub`) and where they live while in use (`manager`)."""
