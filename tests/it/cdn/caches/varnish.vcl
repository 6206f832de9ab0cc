vcl 4.1;

# A cache before shields: what docs/cdn-custom.md shows, as the tests run it. BACKENDS, DIRECTED and KEYS are filled in by
# varnish.rs. What is kept, and for how long, is what Cache-Control of the shield says: the built-in VCL, which runs
# behind all this, reads s-maxage and max-age and keeps nothing that is private, no-store or no-cache. An object is known
# by its whole URL with its query and by its host, which is the built-in hash.

import directors;
import std;

BACKENDS

sub vcl_init {
    new nodes = directors.round_robin();
DIRECTED
}

# The agent says what goes, on a listener of its own.
sub vcl_recv {
    if (local.socket == "agent") {
        if (req.method != "BAN") {
            return (synth(405, "BAN alone"));
        }
        if (std.ban(req.http.ban)) {
            return (synth(200, "banned"));
        }
        return (synth(400, std.ban_error()));
    }
    set req.backend_hint = nodes.backend();
KEYS
}

sub vcl_backend_response {
    # Bans look at objects, so that those nobody asks for are swept too: the URL is kept with the object.
    set beresp.http.x-url = bereq.url;
    # What is too old is not given out while it is fetched anew: a playlist of yesterday names a key of yesterday.
    set beresp.grace = 0s;
    set beresp.keep = 0s;
}

sub vcl_deliver {
    unset resp.http.x-url;
    if (obj.hits > 0) {
        set resp.http.x-cache = "HIT";
    } else {
        set resp.http.x-cache = "MISS";
    }
}
