"""Policy families, one file each. A family's module offers `Config`, `SIZES`, `build` and `init_weights`."""
