//! The keys that CloudFront checks signatures with, one after the other, without turning a viewer away.
//!
//! ```text
//! begun → created → added → switched → removed → deleted → (over)
//!            │        │         │
//!            │        │         └ waits the longest life of a signature by the old key
//!            │        └ waits until CloudFront has it at every edge, then signs by the new one
//!            └ CloudFront has the public key, and the group has not
//! ```
//!
//! What is about to be done is in the folder's `rotation.json` before it is done, and each step finds out by itself
//! whether it was done already; so a crash between any two is gone on with, by whoever has the folder. Nothing is asked
//! of the clock: `now` comes in. A folder that signs with nothing yet gets its first key in the same way.

use std::time::Duration;

use aws_sdk_cloudfront::error::ProvideErrorMetadata;
use aws_sdk_cloudfront::types::{KeyGroupConfig, PublicKeyConfig};
use serde::{Deserialize, Serialize};

use super::super::{CdnError, CdnFault};
use super::errors::Call;
use super::key_files::KeyFiles;
use super::{CloudFront, SignerSettings};
use crate::entropy;
use crate::keys::Timestamp;

const GET_GROUP: &str = "cloudfront:GetKeyGroup";
const UPDATE_GROUP: &str = "cloudfront:UpdateKeyGroup";
const CREATE_KEY: &str = "cloudfront:CreatePublicKey";
const LIST_KEYS: &str = "cloudfront:ListPublicKeys";
const GET_KEY: &str = "cloudfront:GetPublicKey";
const DELETE_KEY: &str = "cloudfront:DeletePublicKey";

/// A new key signs no sooner than this after it was added: whether a distribution's status tells of its key groups'
/// deployment is not documented, and nobody is in a hurry here.
const DEPLOYS_WITHIN: Duration = Duration::from_secs(300);
/// Added to the longest life: clocks differ.
const CLOCK_SKEW: Duration = Duration::from_secs(300);
/// Public keys that are looked through for one that was made before a crash; an account has ten by default.
const MAX_PAGES: usize = 20;

/// What a step did, or what it waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    Begun,
    Created {
        new: String,
    },
    Added,
    WaitsForDeployment {
        until: Timestamp,
    },
    Switched,
    WaitsForOldSignatures {
        until: Timestamp,
    },
    Removed,
    Deleted,
    /// The rotation is over.
    Done,
}

impl Step {
    /// Whether another step makes sense only later.
    pub fn is_waiting(&self) -> bool {
        matches!(self, Step::WaitsForDeployment { .. } | Step::WaitsForOldSignatures { .. })
    }
}

/// How things stand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyGroupStatus {
    /// The key that signs.
    pub signing: Option<String>,
    /// The keys that CloudFront checks with.
    pub in_group: Vec<String>,
    /// The stage that a rotation is at, if there is one, and its new key.
    pub rotation: Option<(&'static str, Option<String>)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Stage {
    Begun,
    Created,
    Added,
    Switched,
    Removed,
    Deleted,
}

impl Stage {
    fn name(self) -> &'static str {
        match self {
            Stage::Begun => "begun",
            Stage::Created => "created",
            Stage::Added => "added",
            Stage::Switched => "switched",
            Stage::Removed => "removed",
            Stage::Deleted => "deleted",
        }
    }
}

/// What is written to the folder.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Rotation {
    stage: Stage,
    /// Names the new key before CloudFront does.
    reference: String,
    old: Option<String>,
    new: Option<String>,
    /// When this stage began.
    since_unix_millis: i64,
}

impl Rotation {
    fn since(&self) -> Timestamp {
        Timestamp::from_unix_millis(self.since_unix_millis)
    }

    fn new_key(&self) -> Result<&str, CdnError> {
        self.new.as_deref().ok_or_else(|| {
            CdnError::new(CdnFault::Invalid, "rotation.json names no new key; remove it to begin anew")
        })
    }
}

/// The key group of a distribution, and the folder of its private keys.
pub struct KeyGroup<'a> {
    front: &'a CloudFront,
    settings: &'a SignerSettings,
    files: KeyFiles,
    resource: String,
}

impl<'a> KeyGroup<'a> {
    pub(super) fn new(front: &'a CloudFront, settings: &'a SignerSettings) -> Self {
        let files = KeyFiles::new(settings.directory.clone());
        Self { front, settings, files, resource: format!("key group {}", settings.key_group_id) }
    }

    /// Steps until one waits or the rotation is over; begins one if there is none.
    ///
    /// # Errors
    /// The first step that fails; the next call goes on with it.
    pub async fn rotate(&self, now: Timestamp) -> Result<Step, CdnError> {
        loop {
            let step = self.rotate_step(now).await?;
            if step.is_waiting() || step == Step::Done {
                return Ok(step);
            }
        }
    }

    /// One step; begins a rotation if there is none.
    ///
    /// # Errors
    /// What CloudFront or the folder refuses, and that another process takes a step now.
    pub async fn rotate_step(&self, now: Timestamp) -> Result<Step, CdnError> {
        let _lock = self.files.lock()?;
        let Some(rotation) = self.files.rotation::<Rotation>()? else { return self.begin(now) };
        match rotation.stage {
            Stage::Begun => self.create(rotation, now).await,
            Stage::Created => self.add(rotation, now).await,
            Stage::Added => self.switch(rotation, now).await,
            Stage::Switched => self.remove(rotation, now).await,
            Stage::Removed => self.delete(rotation, now).await,
            Stage::Deleted => self.end(&rotation),
        }
    }

    /// # Errors
    /// What CloudFront or the folder refuses.
    pub async fn status(&self) -> Result<KeyGroupStatus, CdnError> {
        let rotation = self.files.rotation::<Rotation>()?;
        Ok(KeyGroupStatus {
            signing: self.files.signing()?,
            in_group: self.group().await?.0.items,
            rotation: rotation.map(|rotation| (rotation.stage.name(), rotation.new)),
        })
    }

    /// Whether the key that signs is in the group. A folder that signs with nothing yet is not wrong.
    pub(super) async fn check(&self) -> Result<(), CdnError> {
        let (group, _) = self.group().await?;
        match self.files.signing()? {
            Some(id) if !group.items.contains(&id) => {
                let what =
                    format!("{} has no key {id}, which signs; put it in, or sign by another", self.resource);
                Err(CdnError::new(CdnFault::Invalid, what))
            }
            Some(id) if !self.files.has(&id) => self.files.private_key(&id).map(drop),
            _ => Ok(()),
        }
    }

    fn begin(&self, now: Timestamp) -> Result<Step, CdnError> {
        let rotation = Rotation {
            stage: Stage::Begun,
            reference: hex::encode(*entropy::random::<8>()),
            old: self.files.signing()?,
            new: None,
            since_unix_millis: now.as_unix_millis(),
        };
        self.files.set_rotation(&rotation)?;
        Ok(Step::Begun)
    }

    fn go_on(&self, rotation: Rotation, stage: Stage, now: Timestamp) -> Result<(), CdnError> {
        self.files.set_rotation(&Rotation { stage, since_unix_millis: now.as_unix_millis(), ..rotation })
    }

    async fn create(&self, rotation: Rotation, now: Timestamp) -> Result<Step, CdnError> {
        let public = self.files.make_new(&rotation.reference)?;
        let new = self.create_public_key(&rotation.reference, &public).await?;
        self.go_on(Rotation { new: Some(new.clone()), ..rotation }, Stage::Created, now)?;
        Ok(Step::Created { new })
    }

    async fn create_public_key(&self, reference: &str, public: &str) -> Result<String, CdnError> {
        let call = Call::new(CREATE_KEY, &self.resource);
        let config = PublicKeyConfig::builder()
            .caller_reference(reference)
            .name(name_of(reference))
            .encoded_key(public)
            .comment("keyshield: signs URLs and cookies")
            .build()
            .map_err(|_| call.incomplete())?;
        let request = self.front.clients().await.control.create_public_key();
        match request.public_key_config(config).send().await {
            Ok(created) => created
                .public_key
                .map(|key| key.id)
                .filter(|id| !id.is_empty())
                .ok_or_else(|| call.incomplete()),
            // It was made before a crash.
            Err(error) if error.code() == Some("PublicKeyAlreadyExists") => {
                self.find_public_key(reference).await?.ok_or_else(|| call.failed(&error))
            }
            Err(error) => Err(call.failed(&error)),
        }
    }

    async fn find_public_key(&self, reference: &str) -> Result<Option<String>, CdnError> {
        let (call, mut marker) = (Call::new(LIST_KEYS, &self.resource), None);
        for _ in 0..MAX_PAGES {
            let request = self.front.clients().await.control.list_public_keys().set_marker(marker);
            let listed = request.send().await.map_err(|error| call.failed(&error))?;
            let list = listed.public_key_list.ok_or_else(|| call.incomplete())?;
            if let Some(key) = list.items().iter().find(|key| key.name == name_of(reference)) {
                return Ok(Some(key.id.clone()));
            }
            marker = list.next_marker.filter(|marker| !marker.is_empty());
            if marker.is_none() {
                break;
            }
        }
        Ok(None)
    }

    async fn add(&self, rotation: Rotation, now: Timestamp) -> Result<Step, CdnError> {
        let new = rotation.new_key()?.to_owned();
        self.files.name_new(&rotation.reference, &new)?;
        let (mut group, version) = self.group().await?;
        if !group.items.contains(&new) {
            group.items.push(new);
            self.update(group, version).await?;
        }
        self.go_on(rotation, Stage::Added, now)?;
        Ok(Step::Added)
    }

    async fn switch(&self, rotation: Rotation, now: Timestamp) -> Result<Step, CdnError> {
        let until = rotation.since().plus(DEPLOYS_WITHIN);
        if now < until || !self.front.distribution().await?.is_deployed {
            return Ok(Step::WaitsForDeployment { until });
        }
        self.files.set_signing(rotation.new_key()?)?;
        self.go_on(rotation, Stage::Switched, now)?;
        Ok(Step::Switched)
    }

    async fn remove(&self, rotation: Rotation, now: Timestamp) -> Result<Step, CdnError> {
        let Some(old) = rotation.old.clone() else { return self.end(&rotation) };
        let until = rotation.since().plus(self.settings.longest_life).plus(CLOCK_SKEW);
        if now < until {
            return Ok(Step::WaitsForOldSignatures { until });
        }
        let (mut group, version) = self.group().await?;
        if group.items.contains(&old) {
            group.items.retain(|id| *id != old);
            self.update(group, version).await?;
        }
        self.go_on(rotation, Stage::Removed, now)?;
        Ok(Step::Removed)
    }

    async fn delete(&self, rotation: Rotation, now: Timestamp) -> Result<Step, CdnError> {
        if let Some(old) = &rotation.old {
            self.delete_public_key(old).await?;
        }
        self.go_on(rotation, Stage::Deleted, now)?;
        Ok(Step::Deleted)
    }

    fn end(&self, rotation: &Rotation) -> Result<Step, CdnError> {
        if let Some(old) = &rotation.old {
            self.files.remove_key(old)?;
        }
        self.files.end_rotation()?;
        Ok(Step::Done)
    }

    async fn delete_public_key(&self, id: &str) -> Result<(), CdnError> {
        let resource = format!("public key {id}");
        let control = &self.front.clients().await.control;
        let version = match control.get_public_key().id(id).send().await {
            Ok(got) => got.e_tag,
            Err(error) if error.code() == Some("NoSuchPublicKey") => return Ok(()),
            Err(error) => return Err(Call::new(GET_KEY, &resource).failed(&error)),
        };
        match control.delete_public_key().id(id).set_if_match(version).send().await {
            Ok(_) => Ok(()),
            Err(error) if error.code() == Some("NoSuchPublicKey") => Ok(()),
            Err(error) => Err(Call::new(DELETE_KEY, &resource).failed(&error)),
        }
    }

    /// The group and its version.
    async fn group(&self) -> Result<(KeyGroupConfig, Option<String>), CdnError> {
        let call = Call::new(GET_GROUP, &self.resource);
        let request = self.front.clients().await.control.get_key_group().id(&self.settings.key_group_id);
        let got = request.send().await.map_err(|error| call.failed(&error))?;
        let config = got.key_group.and_then(|group| group.key_group_config);
        Ok((config.ok_or_else(|| call.incomplete())?, got.e_tag))
    }

    async fn update(&self, group: KeyGroupConfig, version: Option<String>) -> Result<(), CdnError> {
        let request = self.front.clients().await.control.update_key_group().id(&self.settings.key_group_id);
        let request = request.key_group_config(group).set_if_match(version);
        let call = Call::new(UPDATE_GROUP, &self.resource);
        request.send().await.map(drop).map_err(|error| call.failed(&error))
    }
}

fn name_of(reference: &str) -> String {
    format!("keyshield-{reference}")
}
