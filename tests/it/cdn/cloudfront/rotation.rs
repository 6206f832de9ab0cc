//! The key group, one key after the other. moto has public keys and key groups but no UpdateKeyGroup, and ministack has
//! neither: the stub has them, and AWS's own client finds it as CloudFront is.

use std::path::{Path, PathBuf};
use std::time::Duration;

use keyshield::cdn::{CdnFault, CloudFront, CloudFrontSettings, DeliveryMode, Signer, Step};
use keyshield::clock::Clock;
use keyshield::keys::Timestamp;
use serde_json::{Value, json};

use super::signer::{NOW, check_signature, parts_of_url};
use super::wires::{Wire, connector, run, signer_settings};

const HOUR: Duration = Duration::from_secs(3_600);

/// A key group with an operator's key in it, which signs.
struct Site {
    wire: Wire,
    cdn: CloudFront,
    group: String,
    folder: PathBuf,
    first: String,
}

fn openssl(arguments: &[&str]) -> String {
    let output =
        std::process::Command::new("openssl").args(arguments).output().expect("openssl is installed");
    assert!(output.status.success(), "{arguments:?}");
    String::from_utf8(output.stdout).unwrap()
}

impl Site {
    fn start() -> Self {
        Self::on(Wire::stub())
    }

    fn on(wire: Wire) -> Self {
        let folder = wire.dir.path().join("keys");
        std::fs::create_dir(&folder).unwrap();
        let private = folder.join("first.pem").display().to_string();
        openssl(&["genrsa", "-out", &private, "2048"]);
        let public = openssl(&["pkey", "-in", &private, "-pubout"]);
        let config = json!({"CallerReference": "first", "Name": "first", "EncodedKey": public});
        let made = wire.by_aws("create_public_key", json!({"PublicKeyConfig": config}));
        let first = made["PublicKey"]["Id"].as_str().unwrap_or_else(|| panic!("{made}")).to_owned();
        let config = json!({"Name": "viewers", "Items": [first]});
        let made = wire.by_aws("create_key_group", json!({"KeyGroupConfig": config}));
        let group = made["KeyGroup"]["Id"].as_str().unwrap_or_else(|| panic!("{made}")).to_owned();
        std::fs::rename(private, folder.join(format!("{first}.pem"))).unwrap();
        std::fs::write(folder.join("signing"), &first).unwrap();
        let signer = Some(signer_settings(&wire, &group));
        let cdn = connector(CloudFrontSettings { signer, ..wire.settings() }, DeliveryMode::Pull);
        Self { wire, cdn, group, folder, first }
    }

    fn step(&self, now: Timestamp) -> Step {
        run(self.cdn.key_group().unwrap().rotate_step(now)).unwrap()
    }

    fn signing(&self) -> String {
        std::fs::read_to_string(self.folder.join("signing")).unwrap().trim().to_owned()
    }

    fn in_group(&self) -> Vec<String> {
        let told = self.wire.tell(&json!({}));
        serde_json::from_value(told["groups"][&self.group]["items"].clone()).unwrap()
    }

    fn state(&self) -> PathBuf {
        self.folder.join("rotation.json")
    }

    /// What must be so at every moment: what is signed now is checked by a key of the group.
    fn check_signs(&self, now: Timestamp) {
        let signer = Signer::new(signer_settings(&self.wire, &self.group), Clock::manual(now));
        let signed = signer.sign_url("https://cdn.example.com/a", now.plus(HOUR)).unwrap();
        let parts = parts_of_url(&signed);
        check_signature(&self.folder, &parts);
        assert!(
            self.in_group().contains(&parts["Key-Pair-Id"]),
            "{} is not in the group",
            parts["Key-Pair-Id"]
        );
    }
}

fn files(folder: &Path) -> Vec<String> {
    let all = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = all.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| name != "rotation.lock");
    names.sort();
    names
}

#[test]
fn a_key_is_added_signs_when_it_is_everywhere_and_replaces_the_old_one_when_that_is_of_no_use() {
    let site = Site::start();
    site.wire.tell(&json!({"deploys": 1}));
    assert_eq!(site.step(NOW), Step::Begun);
    let Step::Created { new } = site.step(NOW) else { panic!("no key was made") };
    assert_eq!(site.in_group(), [site.first.as_str()]);
    assert_eq!(site.step(NOW), Step::Added);
    assert_eq!(site.in_group(), [site.first.clone(), new.clone()]);

    // Neither at once, nor as long as CloudFront is at it.
    let deployed = NOW.plus(Duration::from_secs(300));
    assert_eq!(site.step(NOW), Step::WaitsForDeployment { until: deployed });
    assert_eq!(site.step(deployed), Step::WaitsForDeployment { until: deployed });
    assert_eq!(site.signing(), site.first);
    assert_eq!(site.step(deployed), Step::Switched);
    assert_eq!(site.signing(), new);
    site.check_signs(deployed);

    // Six hours that a signature may live, and five minutes for clocks.
    let until = deployed.plus(6 * HOUR).plus(Duration::from_secs(300));
    assert_eq!(site.step(deployed), Step::WaitsForOldSignatures { until });
    assert_eq!(site.step(until.minus(Duration::from_millis(1))), Step::WaitsForOldSignatures { until });
    assert_eq!(site.in_group().len(), 2);
    assert_eq!(site.step(until), Step::Removed);
    assert_eq!(site.step(until), Step::Deleted);
    assert_eq!(site.step(until), Step::Done);
    assert_eq!(site.in_group(), [new.as_str()]);
    assert_eq!(files(&site.folder), [format!("{new}.pem"), "signing".into()]);
    let told = site.wire.tell(&json!({}));
    assert_eq!(told["keys"].as_object().unwrap().keys().collect::<Vec<_>>(), [&new]);
    site.check_signs(until);
    let status = run(site.cdn.key_group().unwrap().status()).unwrap();
    assert_eq!((status.signing, status.in_group, status.rotation), (Some(new.clone()), vec![new], None));
}

#[test]
fn a_crash_between_any_two_writes_is_gone_on_with() {
    let site = Site::start();
    let (mut now, mut steps) = (NOW, Vec::new());
    loop {
        let before = std::fs::read(site.state()).ok();
        let step = site.step(now);
        // The step was taken, and nobody wrote that down.
        match &before {
            Some(text) => std::fs::write(site.state(), text).unwrap(),
            None => std::fs::remove_file(site.state()).unwrap(),
        }
        site.check_signs(now);
        assert_eq!(site.step(now), step, "it is taken again");
        site.check_signs(now);
        if step.is_waiting() {
            now = now.plus(HOUR);
        }
        let is_over = step == Step::Done;
        steps.push(step);
        if is_over {
            break;
        }
    }
    let new = site.signing();
    assert_eq!(site.in_group(), [new.as_str()]);
    assert_eq!(files(&site.folder), [format!("{new}.pem"), "signing".into()], "{steps:?}");
    assert_eq!(site.wire.tell(&json!({}))["keys"].as_object().unwrap().len(), 1, "no key was made twice");
}

#[test]
fn an_answer_that_is_lost_is_an_answer_that_is_asked_for_again() {
    let site = Site::start();
    let lost = json!([[503, "ServiceUnavailable", true]]);
    let names = ["create_public_key", "update_key_group", "delete_public_key"];
    let mut failures: Value =
        names.iter().map(|name| ((*name).to_owned(), lost.clone())).collect::<serde_json::Map<_, _>>().into();
    failures["update_key_group"] =
        json!([[503, "ServiceUnavailable", true], null, [503, "ServiceUnavailable", true]]);
    site.wire.tell(&json!({"failures": failures}));
    let (mut now, mut away) = (NOW, 0);
    loop {
        match run(site.cdn.key_group().unwrap().rotate(now)) {
            Ok(Step::Done) => break,
            Ok(step) => {
                assert!(step.is_waiting(), "{step:?}");
                now = now.plus(HOUR);
            }
            Err(error) => {
                assert_eq!(error.fault, CdnFault::Away, "{error}");
                away += 1;
                assert!(away < 9, "{error}");
            }
        }
        site.check_signs(now);
    }
    assert!(away >= 3, "{away}");
    assert_eq!(site.in_group(), [site.signing()]);
    assert_eq!(site.wire.tell(&json!({}))["keys"].as_object().unwrap().len(), 1);
}

#[test]
fn whoever_changes_the_group_meanwhile_loses_nothing() {
    let site = Site::start();
    site.step(NOW);
    site.step(NOW);
    site.wire.tell(&json!({"failures": {"update_key_group": [[412, "PreconditionFailed", false]]}}));
    let error = run(site.cdn.key_group().unwrap().rotate_step(NOW)).unwrap_err();
    assert!(error.is_passing() && error.what.contains("at the same time"), "{error}");
    assert_eq!(site.step(NOW), Step::Added, "on what it is now");
    site.wire.tell(&json!({"failures": {"get_distribution": [[403, "AccessDenied", false]]}}));
    let error = run(site.cdn.key_group().unwrap().rotate_step(NOW.plus(HOUR))).unwrap_err();
    assert!(error.what.contains("cloudfront:GetDistribution"), "{error}");
}

#[test]
fn the_first_key_of_a_folder_comes_in_the_same_way() {
    let site = Site::start();
    std::fs::remove_dir_all(&site.folder).unwrap();
    let group = site.cdn.key_group().unwrap();
    assert!(run(group.rotate(NOW)).unwrap().is_waiting());
    assert_eq!(run(group.rotate(NOW.plus(HOUR))).unwrap(), Step::Done);
    site.check_signs(NOW.plus(HOUR));
    assert_eq!(site.in_group(), [site.first.clone(), site.signing()], "what is not the folder's stays");
}

#[test]
fn moto_takes_our_public_key_and_has_no_way_to_change_a_group() {
    let site = Site::on(Wire::moto());
    let group = site.cdn.key_group().unwrap();
    assert_eq!(site.step(NOW), Step::Begun);
    let Step::Created { new } = site.step(NOW) else { panic!("no key was made") };
    let status = run(group.status()).unwrap();
    assert_eq!(status.in_group, [site.first.as_str()]);
    assert_eq!(status.rotation, Some(("created", Some(new.clone()))));
    let got = site.wire.by_aws("get_public_key", json!({"Id": new}));
    let encoded = got["PublicKey"]["PublicKeyConfig"]["EncodedKey"].as_str().unwrap();
    assert!(encoded.starts_with("-----BEGIN PUBLIC KEY-----"), "{got}");
    assert!(
        run(group.rotate_step(NOW)).is_err(),
        "moto changes key groups now: test the whole rotation on it"
    );
}

#[test]
fn the_stub_is_what_awss_own_client_takes_cloudfront_for() {
    let site = Site::start();
    let got = site.wire.by_aws("get_key_group", json!({"Id": site.group}));
    let version = got["ETag"].as_str().unwrap();
    let config = |items: &[&str]| json!({"Name": "viewers", "Items": items});
    let update = |version: &str, items: &[&str]| {
        let arguments = json!({"Id": site.group, "IfMatch": version, "KeyGroupConfig": config(items)});
        site.wire.by_aws("update_key_group", arguments)
    };
    assert_eq!(update("old", &[&site.first])["error"], "PreconditionFailed");
    assert_eq!(update(version, &[site.first.as_str(); 6])["error"], "TooManyPublicKeysInKeyGroup");
    let key = site.wire.by_aws("get_public_key", json!({"Id": site.first}));
    let delete = json!({"Id": site.first, "IfMatch": key["ETag"]});
    assert_eq!(site.wire.by_aws("delete_public_key", delete.clone())["error"], "PublicKeyInUse");
    let changed = update(version, &[]);
    assert_eq!(changed["KeyGroup"]["KeyGroupConfig"]["Name"], "viewers", "{changed}");
    assert_eq!(site.wire.by_aws("delete_public_key", delete), json!({}));
    assert_eq!(site.wire.by_aws("get_public_key", json!({"Id": site.first}))["error"], "NoSuchPublicKey");
    assert_eq!(site.wire.by_aws("list_public_keys", json!({}))["PublicKeyList"]["Quantity"], 0);
}
