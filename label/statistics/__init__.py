"""The statistics that decide a label, one file each; pure functions of codes and concepts."""
