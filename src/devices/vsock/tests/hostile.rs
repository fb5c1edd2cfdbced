//! Guests that break the protocol, flood, or lie; bounds on everything they can fill.

use super::*;

#[test]
fn a_given_up_connect_that_was_never_sent_leaves_nothing() {
    let mut guest = Guest::with_buffers(0);
    for _ in 0..100 {
        let connector = guest.connector();
        let limit = Duration::from_millis(0);
        assert!(runtime().block_on(connector.connect_timeout(PORT, limit)).is_err());
    }
    assert_eq!(guest.counts(), (0, 0, 0));
    guest.post(4);
    guest.silent();
}

#[test]
fn a_guest_that_lies_about_its_counters_gets_nothing() {
    let mut guest = Guest::new();
    let (mut stream, mut end) = connect(&mut guest, 4096);
    end.fwd_cnt = 0x8000_0000;
    end.say(&mut guest, Op::CreditUpdate);
    let task = Task::default();
    assert_eq!(ready(task.write(&mut stream, &[1; 100])), 100);
    guest.expect(Op::CreditRequest);
    guest.silent();
}

#[test]
fn a_guest_that_overruns_the_window_is_reset() {
    let mut guest = Guest::new();
    let (mut stream, end) = connect(&mut guest, 4096);
    let piece = pattern(MAX_PAYLOAD as usize);
    for _ in 0..CAPACITY / piece.len() {
        end.write(&mut guest, &piece);
    }
    guest.silent();
    end.write(&mut guest, b"x");
    guest.expect(Op::Rst);
    let task = Task::default();
    for _ in 0..CAPACITY / piece.len() {
        assert!(ready(task.read(&mut stream, piece.len())) == piece, "what fitted is still readable");
    }
    assert_eq!(failure(task.read(&mut stream, 1)), ErrorKind::ConnectionReset);
}

#[test]
fn a_flood_of_stray_packets_blocks_only_the_guest() {
    let mut guest = Guest::with_buffers(0);
    let stray = End { host: 5, guest: 6, buf_alloc: 0, fwd_cnt: 0 };
    let place = guest.driver.place(&stray.header(Op::Rw).encode());
    for _ in 0..100 {
        guest.driver.add(TX, &[out(place, HEADER_LEN)]);
        guest.driver.kick(TX);
    }
    let taken = std::iter::from_fn(|| guest.driver.used(TX)).count();
    assert!(taken < 100);
    assert_eq!(guest.counts().2, taken);
    let mut resets = 0;
    for _ in 0..10 {
        guest.repost = false;
        guest.post(12);
        while guest.receive().is_some_and(|(header, _)| header.op == Op::Rst as u16) {
            resets += 1;
        }
    }
    assert_eq!(resets, 100, "each is answered in the end");
    assert_eq!(taken + std::iter::from_fn(|| guest.driver.used(TX)).count(), 100);
}

#[test]
fn packets_that_belong_nowhere_are_reset() {
    let mut guest = Guest::new();
    let (_stream, end) = connect(&mut guest, 4096);
    let other = End { guest: 77, ..end };
    for header in [
        other.header(Op::Rw),
        other.header(Op::Response),
        other.header(Op::Request),
        Header { op: 99, ..other.header(Op::Rw) },
        Header { op: 0, ..other.header(Op::Rw) },
        Header { kind: TYPE_STREAM, dst_cid: 9, ..end.header(Op::Request) },
    ] {
        guest.send(header, &[]);
        let reset = guest.expect(Op::Rst);
        assert_eq!((reset.src_cid, reset.dst_cid), (header.dst_cid, header.src_cid));
        assert_eq!((reset.src_port, reset.dst_port), (header.dst_port, header.src_port));
    }
    for header in [
        other.header(Op::Rst),
        // Not from this guest at all.
        Header { src_cid: 4, ..end.header(Op::Rst) },
    ] {
        guest.send(header, &[]);
        guest.silent();
    }
    assert_eq!(guest.counts().0, 1, "the connection was left alone");
}

#[test]
fn violations_end_the_connection() {
    let violations: [fn(End) -> Header; 6] = [
        |end| Header { len: 100, ..end.header(Op::Rw) },
        |end| Header { len: u32::MAX, ..end.header(Op::Rw) },
        |end| Header { len: MAX_PAYLOAD + 1, ..end.header(Op::Rw) },
        |end| Header { op: 42, ..end.header(Op::Rw) },
        |end| end.header(Op::Request),
        |end| end.header(Op::Response),
    ];
    for violation in violations {
        let mut guest = Guest::new();
        let (mut stream, end) = connect(&mut guest, 4096);
        guest.send(violation(end), &[]);
        assert_eq!(guest.expect(Op::Rst).src_port, end.host);
        assert_eq!(failure(Task::default().read(&mut stream, 1)), ErrorKind::ConnectionReset);
        drop(stream);
        assert_eq!(guest.counts(), (0, 0, 0));
    }
}

#[test]
fn payloads_outside_memory_end_the_connection() {
    let mut guest = Guest::new();
    let (mut stream, end) = connect(&mut guest, 4096);
    let header = Header { len: 100, ..end.header(Op::Rw) };
    let place = guest.driver.place(&header.encode());
    guest.driver.add(TX, &[out(place, HEADER_LEN), out(RAM - 50, 100)]);
    guest.driver.kick(TX);
    guest.expect(Op::Rst);
    assert_eq!(failure(Task::default().read(&mut stream, 1)), ErrorKind::ConnectionReset);
}

#[test]
fn a_different_socket_type_is_refused_without_harm() {
    let mut guest = Guest::new();
    let (mut stream, end) = connect(&mut guest, 4096);
    let header = Header { kind: 2, ..end.header(Op::Rst) };
    guest.send(header, &[]);
    guest.silent();
    assert!(Task::default().read(&mut stream, 1).is_pending());
}

#[test]
fn the_backlog_is_bounded() {
    let mut guest = Guest::new();
    let _listener = guest.connector().listen(80).unwrap();
    let mut answers = Vec::new();
    for port in 0..200 {
        End { host: 80, guest: port, buf_alloc: 0, fwd_cnt: 0 }.say(&mut guest, Op::Request);
        answers.push(guest.receive().unwrap().0.op);
    }
    assert_eq!(answers.iter().filter(|&&op| op == Op::Response as u16).count(), 128);
    assert_eq!(answers.iter().filter(|&&op| op == Op::Rst as u16).count(), 72);
}

#[test]
fn connections_are_bounded_and_lingering_ones_give_way() {
    let mut guest = Guest::new();
    let mut streams: Vec<_> = (0..MAX_CONNECTIONS).map(|_| connect(&mut guest, 0).0).collect();
    let connector = guest.connector();
    let error = runtime().block_on(connector.connect(PORT)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::QuotaExceeded);
    let port = streams.remove(10).host_port();
    guest.expect(Op::Shutdown);
    let runtime = runtime();
    let _entered = runtime.enter();
    let mut connecting = pin!(connector.connect(PORT));
    assert!(Task::default().poll(connecting.as_mut()).is_pending());
    assert_eq!(guest.expect(Op::Rst).src_port, port);
    guest.expect(Op::Request);
}

#[test]
fn small_and_odd_receive_buffers() {
    let mut guest = Guest::with_buffers(4);
    let (mut stream, _) = connect(&mut guest, 4096);
    while guest.receive().is_some() {}
    guest.repost = false;
    let task = Task::default();
    let heads: Vec<u16> = {
        let addr = guest.driver.alloc(4096);
        // Too small, header only, read-only, not memory; then a good one in three pieces.
        vec![
            guest.driver.add(RX, &[into(addr, 20)]),
            guest.driver.add(RX, &[into(addr, HEADER_LEN)]),
            guest.driver.add(RX, &[out(addr, 4096)]),
            guest.driver.add(RX, &[into(RAM, 4096)]),
            guest.driver.add(RX, &[into(addr, 40), into(addr + 40, 6), into(addr + 46, 4)]),
        ]
    };
    // The four good buffers of the start come first.
    for _ in 0..4 {
        assert_eq!(ready(task.write(&mut stream, b"x")), 1);
        guest.receive().unwrap();
    }
    assert_eq!(ready(task.write(&mut stream, b"payload")), 7);
    for &head in &heads[..4] {
        assert_eq!(guest.driver.used(RX), Some((head, 0)));
    }
    let (head, len) = guest.driver.used(RX).unwrap();
    assert_eq!((head, len as usize), (heads[4], HEADER_LEN + 6));
    guest.repost = false;
    guest.post(1);
    assert_eq!(guest.receive().unwrap().1, b"d", "the rest follows");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]
    #[test]
    fn random_packets_never_panic(
        packets in proptest::collection::vec(
            (0u16..10, 0u32..5, any::<[u32; 3]>(), 0usize..300, 0u64..5, 0u8..8),
            1..200,
        ),
    ) {
        let mut guest = Guest::with_buffers(6);
        let (mut stream, end) = connect(&mut guest, 1000);
        let _listener = guest.connector().listen(80).unwrap();
        let task = Task::default();
        for (op, flags, [len, buf_alloc, fwd_cnt], size, cid, action) in packets {
            let header = Header {
                op,
                flags,
                len: if len % 3 == 0 { len } else { size as u32 },
                buf_alloc: buf_alloc % 5000,
                fwd_cnt: if fwd_cnt % 2 == 0 { fwd_cnt } else { 0 },
                dst_cid: if cid == 4 { 4 } else { HOST_CID },
                dst_port: if action == 7 { 80 } else { end.host },
                src_port: if action == 7 { len % 4 } else { PORT },
                ..end.header(Op::Rw)
            };
            match action {
                0 => drop(task.write(&mut stream, &vec![0; size])),
                1 => drop(task.read(&mut stream, size)),
                2 => drop(guest.receive()),
                3 => shut(&mut stream),
                _ => {
                    guest.driver.poke(guest.tx, &header.encode());
                    guest.driver.add(TX, &[out(guest.tx, HEADER_LEN), out(guest.tx + 64, size)]);
                    guest.driver.notify(TX);
                    while guest.driver.used(TX).is_some() {}
                    if guest.driver.free(TX) < 10 {
                        break;
                    }
                }
            }
        }
        drop(stream);
        prop_assert!(guest.counts().1 <= guest.counts().0);
    }

    #[test]
    fn random_descriptor_tables_never_panic(
        descriptors in proptest::collection::vec(
            (0usize..3, prop_oneof![0..RAM + 0x1000, any::<u64>()], 0u32..0x1000, 0u16..8, 0u16..20),
            40,
        ),
        heads in proptest::collection::vec((0usize..3, 0u16..16), 1..60),
    ) {
        let mut guest = Guest::with_buffers(0);
        let connector = guest.connector();
        let runtime = runtime();
        let _entered = runtime.enter();
        let mut connecting = pin!(connector.connect(PORT));
        let _ = Task::default().poll(connecting.as_mut());
        for (index, (queue, addr, len, flags, next)) in descriptors.into_iter().enumerate() {
            guest.driver.descriptor(queue, index as u16 % 16, addr, len, flags, next);
        }
        for (queue, head) in heads {
            guest.driver.offer(queue, head);
            guest.driver.notify(queue);
        }
    }
}
