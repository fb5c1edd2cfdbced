//! Drivers, pauses, copies and ends of the machine, and what streams see of them.

use super::*;

#[test]
fn a_connect_waits_for_the_guests_driver() {
    let mut guest = Guest::with_buffers(0);
    guest.driver.set(VIRTIO_MMIO_STATUS, 0);
    let runtime = runtime();
    let _entered = runtime.enter();
    let connector = guest.connector();
    let mut connecting = pin!(connector.connect(PORT));
    let task = Task::default();
    assert!(task.poll(connecting.as_mut()).is_pending());
    // A driver starts with a reset, which must not end what it never heard of.
    guest.driver.probe(u64::MAX, u16::MAX);
    guest.post(4);
    let request = guest.expect(Op::Request);
    End { host: request.src_port, guest: PORT, buf_alloc: 0, fwd_cnt: 0 }.say(&mut guest, Op::Response);
    assert!(task.poll(connecting.as_mut()).is_ready());
}

#[test]
fn a_driver_reset_ends_all_connections() {
    let mut guest = Guest::new();
    let (mut stream, end) = connect(&mut guest, 4096);
    let task = Task::default();
    end.write(&mut guest, b"rest");
    ready(task.read(&mut stream, 4));
    assert!(task.read(&mut stream, 1).is_pending());
    guest.driver.set(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(task.wakes(), 1);
    assert_eq!(failure(task.read(&mut stream, 1)), ErrorKind::ConnectionReset);
    assert_eq!(failure(task.write(&mut stream, b"x")), ErrorKind::ConnectionReset);
    drop(stream);
    assert_eq!(guest.counts(), (0, 0, 0));
    // And the next driver starts afresh.
    guest.driver.probe(u64::MAX, u16::MAX);
    guest.post(8);
    connect(&mut guest, 4096);
}

#[test]
fn the_end_of_the_machine_reaches_everyone() {
    let mut guest = Guest::new();
    let (mut stream, end) = connect(&mut guest, 4096);
    let (mut quiet, _) = connect(&mut guest, 4096);
    let mut listener = guest.connector().listen(80).unwrap();
    let connector = guest.connector();
    let runtime = runtime();
    let _entered = runtime.enter();
    let task = Task::default();
    let mut connecting = pin!(connector.connect(PORT));
    assert!(task.poll(connecting.as_mut()).is_pending());
    let mut accepting = pin!(listener.accept());
    assert!(task.poll(accepting.as_mut()).is_pending());
    assert!(task.read(&mut quiet, 1).is_pending());
    end.write(&mut guest, b"exit 137");

    guest.driver.dev.shutdown();
    assert_eq!(task.wakes(), 3);
    assert_eq!(failure(task.poll(connecting)), ErrorKind::ConnectionReset);
    assert_eq!(failure(task.poll(accepting)), ErrorKind::NotConnected);
    assert_eq!(failure(task.read(&mut quiet, 1)), ErrorKind::ConnectionReset);
    assert_eq!(ready(task.read(&mut stream, 100)), b"exit 137", "what had arrived is not lost");
    assert_eq!(failure(task.read(&mut stream, 1)), ErrorKind::ConnectionReset);
    assert_eq!(failure(task.write(&mut stream, b"x")), ErrorKind::ConnectionReset);
    assert_eq!(runtime.block_on(connector.connect(PORT)).unwrap_err().kind(), ErrorKind::NotConnected);
    assert_eq!(connector.listen(81).unwrap_err().kind(), ErrorKind::NotConnected);
    assert_eq!(Arc::strong_count(&guest.driver.mem), 1, "open streams do not keep guest memory");
}

#[test]
fn a_paused_device_leaves_guest_memory_alone() {
    let mut guest = Guest::new();
    let (mut stream, end) = connect(&mut guest, 4096);
    let task = Task::default();
    guest.driver.dev.pause();
    guest.driver.clean();
    let state = guest.driver.dev.state();
    assert_eq!(ready(task.write(&mut stream, b"while you slept")), 15);
    let runtime = runtime();
    let _entered = runtime.enter();
    let connector = guest.connector();
    let mut connecting = pin!(connector.connect(PORT));
    assert!(task.poll(connecting.as_mut()).is_pending());
    assert!(!guest.driver.any_dirty());
    assert_eq!(guest.driver.dev.state().transport, state.transport);
    assert_eq!(guest.driver.interrupts(), 1);
    guest.driver.dev.resume();
    assert_eq!(guest.driver.interrupts(), 1);
    assert_eq!(guest.receive().unwrap().1, b"while you slept");
    guest.expect(Op::Request);
    end.write(&mut guest, b"hm");
    assert_eq!(ready(task.read(&mut stream, 10)), b"hm");
}

fn take_event(guest: &mut Guest) -> u32 {
    let (head, len) = guest.driver.used(EVENT).expect("an event");
    assert_eq!(len, 4);
    let addr = guest.events[usize::from(head)];
    u32::from_le_bytes(guest.driver.peek(addr, 4).try_into().unwrap())
}

#[test]
fn a_copy_resets_the_transport_before_anything_else() {
    let mut guest = Guest::new();
    guest.post_event_buffers();
    let (mut stream, end) = connect(&mut guest, 4096);
    guest.driver.dev.pause();
    let state = guest.driver.dev.state();
    let mut copy = guest.copied(&state);

    let runtime = runtime();
    let _entered = runtime.enter();
    let connector = copy.connector();
    let task = Task::default();
    let mut connecting = pin!(connector.connect(PORT));
    assert!(task.poll(connecting.as_mut()).is_pending());
    copy.driver.clean();
    assert!(!copy.driver.any_dirty(), "a copy starts paused");
    copy.driver.dev.resume();
    assert!(copy.driver.irq.is_high());
    // The old connection means nothing here, and the new one waits.
    end.write(&mut copy, b"?");
    copy.silent();
    assert_eq!(take_event(&mut copy), TRANSPORT_RESET);
    assert!(copy.driver.used(EVENT).is_none());
    copy.silent();
    // The driver has handled the event when it offers the buffer again.
    let addr = copy.driver.alloc(4);
    copy.driver.add(EVENT, &[into(addr, 4)]);
    assert!(copy.driver.kick(EVENT));
    copy.expect(Op::Rst);
    let request = copy.expect(Op::Request);
    assert_eq!(request.src_port, end.host + 1, "ports go on, the old one may still be in use");
    End { host: request.src_port, guest: PORT, buf_alloc: 10, fwd_cnt: 0 }.say(&mut copy, Op::Response);
    ready(task.poll(connecting));

    // The original, over its own memory, would go on; its stream is still there.
    assert!(task.read(&mut stream, 1).is_pending());
}

#[test]
fn a_reset_event_waits_for_a_buffer() {
    let guest = Guest::new();
    guest.driver.dev.pause();
    let mut copy = guest.copied(&guest.driver.dev.state());
    copy.driver.dev.resume();
    assert!(copy.driver.used(EVENT).is_none());
    copy.post_event_buffers();
    assert_eq!(take_event(&mut copy), TRANSPORT_RESET);
}

#[test]
fn a_copy_without_a_driver_needs_no_reset() {
    let guest = Guest::with_buffers(0);
    guest.driver.set(VIRTIO_MMIO_STATUS, 0);
    let mut copy = guest.copied(&guest.driver.dev.state());
    copy.driver.dev.resume();
    copy.driver.probe(u64::MAX, u16::MAX);
    copy.post_event_buffers();
    copy.post(8);
    connect(&mut copy, 100);
    assert!(copy.driver.used(EVENT).is_none());
}

#[test]
fn a_broken_queue_stops_the_device_and_its_streams() {
    for queue in [RX, TX] {
        let mut guest = Guest::new();
        let (mut stream, _) = connect(&mut guest, 4096);
        let task = Task::default();
        assert!(task.read(&mut stream, 1).is_pending());
        guest.driver.set_avail_idx(queue, 30_000);
        if queue == RX {
            assert_eq!(ready(task.write(&mut stream, b"x")), 1);
        } else {
            guest.driver.notify(TX);
        }
        assert_ne!(guest.driver.status() & 0x40, 0, "queue {queue}");
        assert_eq!(task.wakes(), 1);
        assert_eq!(failure(task.read(&mut stream, 1)), ErrorKind::ConnectionReset);
    }
    let mut guest = Guest::new();
    guest.driver.set_avail_idx(EVENT, 30_000);
    guest.driver.dev.pause();
    let copy = guest.copied(&guest.driver.dev.state());
    copy.driver.dev.resume();
    assert_ne!(copy.driver.status() & 0x40, 0);
}

state_round_trips! {
    state,
    device: Guest::new(),
    mutate: |guest: &mut Guest| {
        connect(guest, 100);
    },
    save: |guest: &Guest| guest.driver.dev.state(),
    restore: |guest: &Guest, state: &MmioState<VsockState>| guest.copied(state),
}

#[test]
fn another_guest_id_is_refused() {
    let mut state = Vsock::new().state();
    assert!(Vsock::restore((), &state).is_ok());
    state.guest_cid = 4;
    assert!(Vsock::restore((), &state).is_err());
}
