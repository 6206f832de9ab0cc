call keyshield_error;
