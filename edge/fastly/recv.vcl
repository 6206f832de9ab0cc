call keyshield_recv;
