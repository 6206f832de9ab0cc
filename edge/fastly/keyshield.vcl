# keyshield at Fastly: keys from an edge dictionary, opened here and given to players.
#
# What it is: a snippet of the type "init" with two subroutines. recv.vcl and error.vcl call them, in vcl_recv and
# vcl_error. `keyshield cdn deploy` puts all of it into the service, together with a snippet of settings (two tables,
# keyshield_settings and keyshield_origins) and the private dictionary keyshield_secrets.
#
# Answered here, from the dictionary keyshield_keys:
#   {key path}{key ID}         the key, 16 or 32 bytes
#   {key path}{key ID}/check   its check value: shows that this edge has the key without showing the key
# Whatever else there is, and a key that is not here, goes on to the shield as if this code were not there.
#
# Why this shape: vcl_recv decides and vcl_error answers, because only there a body can be written. Nothing is handed
# over between the two but the number of the answer: what is in a request header can end up in somebody's log, and a
# client can send it. So vcl_error looks the record up and opens it again.
#
# Deliberately absent: keys in the clear, in a header, in a log line or in a cache; a list of revoked keys (a revoked
# key is taken out of the dictionary, and the shield, asked for it then, answers 410).
#
# The format of records, check values and tokens is the shield's: src/keys/edge.rs.

# @scope: recv
sub keyshield_recv {
  declare local var.key_path STRING;
  declare local var.rest STRING;
  declare local var.id STRING;
  declare local var.is_check BOOL;
  declare local var.record STRING;
  declare local var.stream STRING;
  declare local var.mac_key STRING;
  declare local var.is_here BOOL;
  declare local var.token_key STRING;
  declare local var.token STRING;
  declare local var.is_allowed BOOL;

  set var.key_path = table.lookup(keyshield_settings, "key_path", "");
  if (!std.prefixof(req.url.path, var.key_path)) {
    # The shield answers here whatever else is set: no way around the token.
    set var.key_path = "/api/hls/keys/";
  }
  # A purge by URL comes through here too, and is none of this code's business.
  if (req.method != "FASTLYPURGE" && std.prefixof(req.url.path, var.key_path)) {
    set var.rest = substr(req.url.path, std.strlen(var.key_path));
    if (var.rest ~ "^([0-9a-f]{32})(/check)?$") {
      set var.id = re.group.1;
      set var.is_check = false;
      if (var.rest ~ "/check$") {
        set var.is_check = true;
      }

      if (req.method == "OPTIONS") {
        error 665 "keyshield";
      }
      if (req.method != "GET" && req.method != "HEAD") {
        error 664 "keyshield";
      }

      # A record that was changed, moved to another key ID or sealed under another secret counts as none.
      set var.is_here = false;
      set var.stream = "";
      set var.record = table.lookup(keyshield_keys, var.id, "");
      set var.mac_key = table.lookup(keyshield_secrets, "mac_key", "");
      if (var.record ~ "^1:ctr:([A-Za-z0-9._-]{1,128}):([0-9a-f]{32}):([0-9a-f]{32}|[0-9a-f]{64}):([0-9a-f]{64})$") {
        set var.stream = re.group.1;
        if (std.strlen(var.mac_key) == 64 && digest.secure_is_equal("0x" + re.group.4, digest.hmac_sha256(var.mac_key, var.id + ":1:ctr:" + re.group.1 + ":" + re.group.2 + ":" + re.group.3))) {
          set var.is_here = true;
        }
      }
      if (var.record != "" && !var.is_here) {
        log "syslog " + req.service_id + " keyshield :: the record of key " + var.id + " does not open: it was changed, or sealed under another edge secret";
      }

      # With shielding this code runs at two POPs: the one next to the viewer has checked the token.
      if (!var.is_check && fastly.ff.visits_this_service == 0) {
        set var.token_key = table.lookup(keyshield_secrets, "token_key", "");
        if (var.token_key != "" || table.lookup(keyshield_settings, "viewer_token", "") == "required") {
          set var.is_allowed = false;
          set var.token = urldecode(subfield(req.url.qs, "token", "&"));
          if (var.token ~ "^([1-9][0-9]{0,10})~([A-Za-z0-9._-]{1,128}|[*])~([0-9a-f]{64})$") {
            if (std.strlen(var.token_key) == 64 && digest.secure_is_equal("0x" + re.group.3, digest.hmac_sha256(var.token_key, re.group.1 + "~" + re.group.2))) {
              # Of a key that is not here, nothing here says the stream: its token is good if it is genuine.
              if (std.atoi(re.group.1) >= std.atoi(now.sec) && (re.group.2 == "*" || !var.is_here || re.group.2 == var.stream)) {
                set var.is_allowed = true;
              }
            }
          }
          if (!var.is_allowed) {
            error 663 "keyshield";
          }
        }
      }

      if (var.is_here && var.is_check) {
        error 661 "keyshield";
      }
      if (var.is_here) {
        error 660 "keyshield";
      }
      if (var.is_check) {
        error 662 "keyshield";
      }
    }
  }
}

# @scope: error
sub keyshield_error {
  declare local var.id STRING;
  declare local var.record STRING;
  declare local var.stream STRING;
  declare local var.key STRING;

  if (obj.response == "keyshield") {
    set obj.http.Keyshield-Served-By = "edge";
    if (table.contains(keyshield_origins, "*")) {
      set obj.http.Access-Control-Allow-Origin = "*";
    } else {
      set obj.http.Vary = "Origin";
      if (req.http.Origin && table.contains(keyshield_origins, req.http.Origin)) {
        set obj.http.Access-Control-Allow-Origin = req.http.Origin;
      }
    }
    if (obj.http.Access-Control-Allow-Origin) {
      set obj.http.Access-Control-Expose-Headers = "Accept-Ranges, Age, Content-Length, Content-Range, ETag";
    }

    set var.key = "";
    if (obj.status == 660 || obj.status == 661) {
      if (req.url.path ~ "([0-9a-f]{32})(/check)?$") {
        set var.id = re.group.1;
      }
      set var.record = table.lookup(keyshield_keys, var.id, "");
      if (var.record ~ "^1:ctr:([^:]+):([0-9a-f]+):([0-9a-f]+):") {
        set var.stream = re.group.1;
        set var.key = std.tolower(crypto.decrypt_hex(aes256, ctr, nopad, table.lookup(keyshield_secrets, "encryption_key", ""), re.group.2, re.group.3));
      }
      if (std.strlen(var.key) != 32 && std.strlen(var.key) != 64) {
        # The record was there a moment ago, so it is the encryption key that is missing.
        set obj.status = 503;
        set obj.response = "Service Unavailable";
        set obj.http.Content-Type = "application/problem+json";
        set obj.http.Cache-Control = "no-store";
        synthetic {"{"type":"about:blank","title":"Service Unavailable","status":503,"detail":"this edge cannot open its keys" }"};
        return(deliver);
      }
    }

    if (obj.status == 660) {
      set obj.status = 200;
      set obj.response = "OK";
      set obj.http.Content-Type = "application/octet-stream";
      set obj.http.Cache-Control = "private, max-age=" + table.lookup(keyshield_settings, "key_max_age", "300");
      set obj.http.X-Content-Type-Options = "nosniff";
      set obj.http.Surrogate-Key = "keyshield-stream-" + var.stream + " keyshield-key-" + var.id;
      set obj.http.Cache-Tag = "keyshield-stream-" + var.stream + ",keyshield-key-" + var.id;
      set obj.http.Keyshield-Key = var.id;
      # A key may hold a zero byte, which no STRING can: it goes from hex to the body without becoming one.
      synthetic.base64 bin.hex_to_base64(var.key);
    } else if (obj.status == 661) {
      set obj.status = 200;
      set obj.response = "OK";
      set obj.http.Content-Type = "text/plain";
      set obj.http.Cache-Control = "no-store";
      synthetic substr(digest.hmac_sha256(var.key, "keyshield check " + var.id), 2, 16);
    } else if (obj.status == 662) {
      set obj.status = 404;
      set obj.response = "Not Found";
      set obj.http.Content-Type = "application/problem+json";
      set obj.http.Cache-Control = "no-store";
      synthetic {"{"type":"about:blank","title":"Not Found","status":404,"detail":"this edge has no key of this ID" }"};
    } else if (obj.status == 663) {
      set obj.status = 403;
      set obj.response = "Forbidden";
      set obj.http.Content-Type = "application/problem+json";
      set obj.http.Cache-Control = "no-store";
      synthetic {"{"type":"about:blank","title":"Forbidden","status":403,"detail":"the viewer token is missing, expired, or for another stream" }"};
    } else if (obj.status == 664) {
      set obj.status = 405;
      set obj.response = "Method Not Allowed";
      set obj.http.Content-Type = "application/problem+json";
      set obj.http.Cache-Control = "no-store";
      set obj.http.Allow = "GET, HEAD, OPTIONS";
      synthetic {"{"type":"about:blank","title":"Method Not Allowed","status":405,"detail":"only GET, HEAD and OPTIONS are answered here" }"};
    } else {
      set obj.status = 204;
      set obj.response = "No Content";
      set obj.http.Access-Control-Allow-Methods = "GET, HEAD, OPTIONS";
      set obj.http.Access-Control-Allow-Headers = "*, Authorization, Range";
      set obj.http.Access-Control-Max-Age = "86400";
      synthetic "";
    }
    return(deliver);
  }
}
