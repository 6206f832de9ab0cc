//! Keys taken back: refused to players from this moment, replaced where they were used, and let go of by every CDN.
//!
//! One transaction makes the keys compromised, promotes their successor and opens the incident that CDNs are worked
//! through by (`delivery`). The caller waits for that transaction alone.

use std::time::Duration;

use super::Operator;
use super::deks::InHand;
use super::delivery::{Delivery, Incident};
use super::operate::{ATTEMPTS, not_known};
use super::operator::{OperatorError, Revocation};
use super::stream::{Known, Stream};
use super::worker::Core;
use crate::entropy;
use crate::keys::{IncidentId, KeyId, KeyState, Ordinal, Reason, StreamId, Timestamp};
use crate::store::{NewIncident, WriteOp};

/// Paths that an incident keeps, for CDNs to be asked what they still have.
const MAX_PATHS: usize = 16;

impl Operator {
    /// Takes keys back: one, or all that are in use. The successor is in force when this returns.
    ///
    /// # Errors
    /// [`OperatorError::NoStream`], [`OperatorError::NoKey`], [`OperatorError::NotRevocable`],
    /// [`OperatorError::RevocationDisabled`].
    pub async fn revoke(
        &self,
        id: &StreamId,
        key: Option<KeyId>,
        reason: &str,
        actor: &str,
    ) -> Result<Revocation, OperatorError> {
        let core = &self.core;
        let stream = core.known_stream(id).await?;
        // For a successor that is still to be made. Mostly one waits, and then no KMS is waited for.
        let mut hand = InHand::new();
        if !stream.known.read().has_successor(id, key, &core.delivery) {
            hand = core.newest_dek(&stream).await;
        }
        let _changing = stream.changing.lock().await;
        for _ in 0..ATTEMPTS {
            core.refresh(&stream).await?;
            let at = core.now();
            let (ordinals, successor, transition) = {
                let known = stream.known.read();
                if !known.row.policy.emergency_rotation {
                    return Err(OperatorError::RevocationDisabled(id.clone()));
                }
                let ordinals = known.to_revoke(id, key)?;
                let successor =
                    known.successor_of(&ordinals, &core.delivery).ok_or(OperatorError::NotReady)?;
                let transition = known.transition(&ordinals);
                (ordinals, successor, transition)
            };
            let incident =
                core.new_incident(&stream, (&ordinals, successor), (reason, actor), at, transition);
            let begun = incident.clone();
            let promote = WriteOp::Promote {
                upto: successor,
                reason: Reason::Revocation,
                actor: Some(actor.to_owned()),
                at,
            };
            let revoke = WriteOp::Revoke {
                ordinals: ordinals.clone(),
                successor,
                reason: reason.to_owned(),
                actor: actor.to_owned(),
                at,
                transition_until: at.plus(transition),
            };
            // Revoked first: a key that waits before the successor must not be promoted with it. Forced last:
            // another node may have promoted it by count meanwhile.
            let incident = WriteOp::PutIncident(Box::new(incident));
            let ops = vec![revoke, promote, WriteOp::Force { ordinal: successor }, incident];
            if core.write(&stream, successor, ops, &hand).await?.first().is_none_or(|count| *count == 0) {
                continue;
            }
            core.delivery.wake_purges();
            let known = stream.known.read();
            let successor = known.info_of(successor).ok_or_else(not_known)?;
            return Ok(Revocation {
                revoked: ordinals.iter().filter_map(|ordinal| known.info_of(*ordinal)).collect(),
                successor: successor.clone(),
                reason: reason.to_owned(),
                revoked_by: actor.to_owned(),
                revoked_at: at,
                transition,
                incident: Incident::begun(begun, successor.id),
            });
        }
        Err(OperatorError::Failed(format!("other nodes keep rotating stream {id}")))
    }
}

impl Core {
    fn new_incident(
        &self,
        stream: &Stream,
        (revoked, successor): (&[Ordinal], Ordinal),
        (reason, actor): (&str, &str),
        at: Timestamp,
        transition: Duration,
    ) -> NewIncident {
        let known = stream.known.read();
        let keys: Vec<_> = revoked.iter().filter_map(|ordinal| known.keys.get(ordinal)).collect();
        let cdns = self.delivery.of_stream(&known.row.cdn);
        let places = self.delivery.places.iter().filter(|place| cdns.has(place.at));
        NewIncident {
            id: IncidentId::at(at, *entropy::random()),
            stream: stream.id.clone(),
            reason: reason.to_owned(),
            actor: actor.to_owned(),
            revoked_at: at,
            transition_until: at.plus(transition),
            successor,
            keys: keys.iter().map(|key| key.live.id).collect(),
            // Those of the newest key first: it is what caches have most of.
            paths: keys.iter().rev().flat_map(|key| key.live.sample_paths()).take(MAX_PATHS).collect(),
            cdns: places.map(|place| place.cdn.name.clone()).collect(),
        }
    }
}

impl Known {
    /// The key that was named, or all that players may have.
    fn to_revoke(&self, id: &StreamId, key: Option<KeyId>) -> Result<Vec<Ordinal>, OperatorError> {
        let Some(key) = key else {
            let in_use = |state| matches!(state, KeyState::Active | KeyState::Deactivated);
            return Ok(self.keys.iter().filter(|(_, key)| in_use(key.life.state)).map(|(o, _)| *o).collect());
        };
        let found = self.keys.iter().find(|(_, known)| known.live.id == key);
        let (ordinal, found) = found.ok_or_else(|| OperatorError::NoKey { stream: id.clone(), key })?;
        match found.life.state.transition_to(KeyState::Compromised) {
            Some(_) => Ok(vec![*ordinal]),
            None => Err(OperatorError::NotRevocable { key, state: found.life.state.name() }),
        }
    }

    /// The ordinal of the key that takes the place of keys; it may be one that is still to be made.
    fn successor_of(&self, ordinals: &[Ordinal], delivery: &Delivery) -> Option<Ordinal> {
        let highest = ordinals.iter().copied().fold(self.marks()?.head, Ordinal::max);
        Some(self.facts(true, delivery).after(highest))
    }

    /// Whether what takes the place of keys is there already.
    fn has_successor(&self, id: &StreamId, key: Option<KeyId>, delivery: &Delivery) -> bool {
        let successor = self.to_revoke(id, key).ok().and_then(|keys| self.successor_of(&keys, delivery));
        successor.is_some_and(|successor| self.keys.contains_key(&successor))
    }

    /// How long players may hold a playlist that names one of these keys and go on by it: so many Target
    /// Durations, or for a presentation that has ended its whole length.
    fn transition(&self, ordinals: &[Ordinal]) -> Duration {
        let lowest = ordinals.iter().min().copied().unwrap_or(Ordinal::FIRST);
        let factor = self.row.policy.revocation_transition;
        let of = |own: &super::stream::Rendition| match (factor, own.ended) {
            (0, _) => Duration::ZERO,
            (_, true) => own.longest_playlist,
            (factor, false) => own.target_duration * factor,
        };
        let touched = |own: &&super::stream::Rendition| own.facts().current >= lowest;
        self.renditions.values().filter(touched).map(of).max().unwrap_or_default()
    }
}
