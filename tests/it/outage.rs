//! What a fleet does when its store, or one of its nodes, goes away.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::fleet::{Fleet, LEASE, ROTATION_INTERVAL, Store};
use crate::harness::{secs_from, wait_at_most};
use crate::postgres::Postgres;
use crate::watch::{Totals, Watch};
use crate::wire::Wire;

const STREAMS: usize = 10;
/// How long the nodes have to be in step again, and to rotate, once the store is back.
const BACK_IN_STEP: Duration = Duration::from_secs(15);
/// How long they are looked at while all is well.
const STEADY: Duration = Duration::from_secs(8);

/// How long after a lease has run out another node may take to have it, to say so, and to be asked.
const TAKEOVER_SLACK: Duration = Duration::from_millis(1_500);

/// Takes the store away for a while, under load. Nothing that players ask for may fail meanwhile: [`Watch`] sees
/// to that, and to every playlist keeping up with the origin. Where a boundary was stored in the last moment, one
/// node may know of it and the other not; that the two differ then is what being apart means, and it must be over
/// soon after the mending. Nothing can be rotated meanwhile, which also shows that the store was away.
fn check_outage(take_away: impl FnOnce(&Wire)) {
    let outage = secs_from("OUTAGE_SECS", 20);
    let postgres = Postgres::shared();
    let wire = Wire::to(postgres.address());
    let store = Store::Postgres(postgres.database_at(wire.address));
    let fleet = Fleet::start(2, STREAMS, &store, STEADY + outage + BACK_IN_STEP + ROTATION_INTERVAL);
    let watch = fleet.watch();
    watch.during(|| {
        watch.pause(STEADY);
        let (connections, decrypted) = (wire.carried(), Totals::count(&watch.totals.decrypted));
        watch.may_differ.store(true, Ordering::Relaxed);
        take_away(&wire);
        // What was on its way may arrive still.
        watch.pause(Duration::from_secs(1));
        let rotated = fleet.rotated();
        ask_for_keys_again_and_again(&watch, outage);
        let decrypted = Totals::count(&watch.totals.decrypted) - decrypted;
        println!("without the store for {outage:?}, {decrypted} segments decrypted");

        assert_eq!(fleet.rotated(), rotated, "a rotation is stored before it is published");
        let mended = Instant::now();
        wire.mend();
        wait_at_most(BACK_IN_STEP, "a rotation after the outage", || {
            (fleet.rotated() > rotated || watch.has_failed()).then_some(())
        });
        println!("rotated {:?} after the store was back", mended.elapsed());
        watch.pause(BACK_IN_STEP.saturating_sub(mended.elapsed()));
        assert!(wire.carried() > connections, "the nodes came back over the wire");

        watch.may_differ.store(false, Ordering::Relaxed);
        let compared = Totals::count(&watch.totals.compared);
        watch.pause(ROTATION_INTERVAL);
        assert!(watch.has_failed() || Totals::count(&watch.totals.compared) > compared);
    });
    println!("{:?}, rotations: {:?}", watch.totals, fleet.rotations());
}

fn ask_for_keys_again_and_again(watch: &Watch, time: Duration) {
    let started = Instant::now();
    while started.elapsed() < time && !watch.has_failed() {
        watch.forget_keys();
        watch.pause(Duration::from_secs(1));
    }
}

#[test]
fn players_notice_nothing_of_a_store_that_refuses_connections_for_a_while() {
    check_outage(Wire::cut);
}

#[test]
fn players_notice_nothing_of_a_store_that_falls_silent_for_a_while() {
    check_outage(Wire::silence);
}

#[test]
fn when_the_holder_of_the_lease_is_killed_another_node_goes_on_rotating() {
    let postgres = Postgres::shared();
    let takeover = LEASE + Duration::from_secs(5);
    let rotation = ROTATION_INTERVAL + Duration::from_secs(5);
    let store = Store::Postgres(postgres.database());
    let mut fleet = Fleet::start(2, STREAMS, &store, STEADY + takeover + rotation + STEADY);
    let watch = fleet.watch();
    watch.during(|| watch.pause(STEADY));

    let held = |fleet: &Fleet| -> Vec<bool> {
        let holds = |node: &crate::harness::Running| node.metric("keyshield_lease_held") == 1.0;
        fleet.nodes.iter().map(holds).collect()
    };
    let holder = wait_at_most(takeover, "a lease that one node holds", || match held(&fleet)[..] {
        [true, false] => Some(0),
        [false, true] => Some(1),
        _ => None,
    });
    fleet.nodes.remove(holder).kill();
    let killed = Instant::now();

    let survivor = &fleet.nodes[0];
    let watch = fleet.watch_one(survivor);
    watch.during(|| {
        wait_at_most(takeover, "the survivor's lease", || {
            (held(&fleet) == [true] || watch.has_failed()).then_some(())
        });
        let held_after = killed.elapsed();
        println!("the survivor held the lease {held_after:?} after the kill");
        assert!(watch.has_failed() || held_after <= LEASE + TAKEOVER_SLACK, "{held_after:?}");
        let rotated = fleet.rotated();
        wait_at_most(rotation, "a rotation by the survivor", || {
            (fleet.rotated() > rotated || watch.has_failed()).then_some(())
        });
        println!("it rotated {:?} after the kill", killed.elapsed());
        watch.pause(STEADY);
    });
    println!("{:?}, rotations: {:?}", watch.totals, fleet.rotations());
}

#[test]
fn a_node_that_is_stopped_leaves_the_fleet_at_once() {
    let postgres = Postgres::shared();
    let url = postgres.database();
    let mut fleet = Fleet::start(2, 1, &Store::Postgres(url.clone()), STEADY);
    let database = url.rsplit('/').next().expect("a name");
    let nodes = || postgres.sql(database, "SELECT count(*) FROM nodes");
    assert_eq!(nodes(), "2");
    assert_eq!(fleet.nodes[0].stop("-TERM"), Some(0));
    assert_eq!(nodes(), "1", "nobody waits for the reports of one that is gone");
    wait_at_most(LEASE, "the survivor's lease", || {
        (fleet.nodes[1].metric("keyshield_lease_held") == 1.0).then_some(())
    });
    assert_eq!(fleet.nodes[1].stop("-INT"), Some(0));
    assert_eq!(
        (nodes().as_str(), postgres.sql(database, "SELECT count(*) FROM leases").as_str()),
        ("0", "0")
    );
}
