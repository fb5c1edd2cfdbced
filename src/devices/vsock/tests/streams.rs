//! Well-behaved guests: conversations, flow control in both directions, closing.

use super::*;

#[test]
fn a_whole_conversation() {
    let mut guest = Guest::new();
    let (mut stream, end) = connect(&mut guest, 64 * 1024);
    let task = Task::default();
    assert!(task.read(&mut stream, 10).is_pending());
    assert_eq!(ready(task.write(&mut stream, b"uname")), 5);
    let (header, data) = guest.receive().unwrap();
    assert_eq!((header.op, data.as_slice()), (Op::Rw as u16, &b"uname"[..]));
    assert_eq!(guest.driver.interrupts(), 1);
    end.write(&mut guest, b"Linux\n");
    assert_eq!(task.wakes(), 1);
    assert_eq!(ready(task.read(&mut stream, 3)), b"Lin");
    assert_eq!(ready(task.read(&mut stream, 10)), b"ux\n");
    // The guest closes: the rest is read, then the end; the answer is a reset.
    end.write(&mut guest, b"bye");
    end.shutdown(&mut guest, SHUTDOWN_BOTH);
    guest.expect(Op::Rst);
    assert_eq!(failure(task.write(&mut stream, b"?")), ErrorKind::BrokenPipe);
    assert_eq!(ready(task.read(&mut stream, 10)), b"bye");
    assert_eq!(ready(task.read(&mut stream, 10)), b"");
    assert_eq!(guest.counts().0, 1);
    drop(stream);
    guest.silent();
    assert_eq!(guest.counts(), (0, 0, 0));
}

#[test]
fn refused_when_nobody_listens() {
    let mut guest = Guest::new();
    let runtime = runtime();
    let _entered = runtime.enter();
    let connector = guest.connector();
    let mut connecting = pin!(connector.connect(7));
    let task = Task::default();
    assert!(task.poll(connecting.as_mut()).is_pending());
    let request = guest.expect(Op::Request);
    let end = End { host: request.src_port, guest: 7, buf_alloc: 0, fwd_cnt: 0 };
    end.say(&mut guest, Op::Rst);
    assert_eq!(failure(task.poll(connecting.as_mut())), ErrorKind::ConnectionRefused);
    guest.silent();
    assert_eq!(guest.counts(), (0, 0, 0));
}

#[test]
fn a_connect_that_times_out_takes_the_request_back() {
    let mut guest = Guest::new();
    let connector = guest.connector();
    let error = runtime().block_on(connector.connect_timeout(PORT, Duration::from_millis(1))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    let request = guest.expect(Op::Request);
    assert_eq!(guest.expect(Op::Rst).src_port, request.src_port);
    // An answer that comes too late is for nobody.
    End { host: request.src_port, guest: PORT, buf_alloc: 0, fwd_cnt: 0 }.say(&mut guest, Op::Response);
    guest.expect(Op::Rst);
    assert_eq!(guest.counts(), (0, 0, 0));
}

#[test]
fn a_megabyte_to_the_guest() {
    let mut guest = Guest::new();
    let (mut stream, mut end) = connect(&mut guest, 64 * 1024);
    let task = Task::default();
    let data = pattern(1 << 20);
    let (mut sent, mut received) = (0, Vec::new());
    let mut rounds = 0;
    while received.len() < data.len() {
        rounds += 1;
        assert!(rounds < 10_000, "stalled at {} of {}", received.len(), data.len());
        while sent < data.len()
            && let Poll::Ready(count) = task.write(&mut stream, &data[sent..])
        {
            sent += count.unwrap();
        }
        while let Some((header, payload)) = guest.receive() {
            if header.op == Op::Rw as u16 {
                received.extend(payload);
                let unread = received.len() as u32 - end.fwd_cnt;
                assert!(unread <= end.buf_alloc, "the guest's window was overrun");
            }
        }
        end.fwd_cnt = received.len() as u32;
        end.say(&mut guest, Op::CreditUpdate);
    }
    assert!(received == data);
    assert_eq!(sent, data.len());
}

#[test]
fn a_megabyte_to_the_host() {
    let mut guest = Guest::new();
    let (mut stream, end) = connect(&mut guest, 64 * 1024);
    let task = Task::default();
    let data = pattern(1 << 20);
    let (mut sent, mut received, mut window) = (0, Vec::new(), CAPACITY);
    let mut updates = 0;
    while received.len() < data.len() {
        while sent < data.len() && window > 0 {
            let count = window.min(data.len() - sent).min(MAX_PAYLOAD as usize);
            end.write(&mut guest, &data[sent..sent + count]);
            sent += count;
            window -= count;
        }
        let wakes = task.wakes();
        while let Poll::Ready(bytes) = task.read(&mut stream, 50_000) {
            received.extend(bytes.unwrap());
        }
        let before = window;
        while let Some((header, _)) = guest.receive() {
            assert_eq!(header.op, Op::CreditUpdate as u16);
            window = CAPACITY - (sent as u32).wrapping_sub(header.fwd_cnt) as usize;
            updates += 1;
        }
        assert!(window > before || received.len() == data.len(), "reading gave no credit back");
        assert!(sent == data.len() || wakes <= updates, "woken without cause");
    }
    assert!(received == data);
    assert!(updates <= 16, "{updates} credit updates for 16 windows");
}

#[test]
fn without_credit_the_writer_waits_and_asks_once() {
    let mut guest = Guest::new();
    let (mut stream, mut end) = connect(&mut guest, 1000);
    let task = Task::default();
    let data = pattern(1000 + CAPACITY + 500);
    assert_eq!(ready(task.write(&mut stream, &data)), 1000 + CAPACITY);
    assert_eq!(guest.expect(Op::Rw).len, 1000);
    guest.expect(Op::CreditRequest);
    assert!(task.write(&mut stream, &data[1000 + CAPACITY..]).is_pending());
    guest.silent();
    // An answer without credit, then one with some.
    end.say(&mut guest, Op::CreditUpdate);
    guest.silent();
    assert_eq!(task.wakes(), 0);
    end.fwd_cnt = 600;
    end.say(&mut guest, Op::CreditUpdate);
    let (_, payload) = guest.receive().unwrap();
    assert_eq!(payload, data[1000..1600]);
    assert_eq!(task.wakes(), 1);
    assert_eq!(ready(task.write(&mut stream, &data[1000 + CAPACITY..])), 500);
    guest.expect(Op::CreditRequest);
    guest.silent();
}

#[test]
fn credit_is_told_when_asked() {
    let mut guest = Guest::new();
    let (mut stream, end) = connect(&mut guest, 4096);
    end.write(&mut guest, &[1; 100]);
    end.say(&mut guest, Op::CreditRequest);
    assert_eq!(guest.expect(Op::CreditUpdate).fwd_cnt, 0);
    ready(Task::default().read(&mut stream, 70));
    guest.silent();
    end.say(&mut guest, Op::CreditRequest);
    assert_eq!(guest.expect(Op::CreditUpdate).fwd_cnt, 70);
}

#[test]
fn a_reset_from_the_guest_is_an_error_after_the_data() {
    let mut guest = Guest::new();
    let (mut stream, end) = connect(&mut guest, 4096);
    let task = Task::default();
    end.write(&mut guest, b"last words");
    end.say(&mut guest, Op::Rst);
    assert_eq!(ready(task.read(&mut stream, 100)), b"last words");
    assert_eq!(failure(task.read(&mut stream, 100)), ErrorKind::ConnectionReset);
    assert_eq!(failure(task.write(&mut stream, b"x")), ErrorKind::ConnectionReset);
    drop(stream);
    guest.silent();
    assert_eq!(guest.counts(), (0, 0, 0));
}

#[test]
fn the_guest_half_closes() {
    let mut guest = Guest::new();
    let (mut stream, end) = connect(&mut guest, 4096);
    let task = Task::default();
    assert!(task.read(&mut stream, 10).is_pending());
    end.shutdown(&mut guest, SHUTDOWN_SEND);
    assert_eq!(task.wakes(), 1);
    assert_eq!(ready(task.read(&mut stream, 10)), b"");
    assert_eq!(ready(task.write(&mut stream, b"still here")), 10);
    guest.expect(Op::Rw);
    end.shutdown(&mut guest, SHUTDOWN_RCV);
    guest.expect(Op::Rst);
    assert_eq!(failure(task.write(&mut stream, b"x")), ErrorKind::BrokenPipe);
}

#[test]
fn a_guest_that_stops_reading_breaks_the_pipe() {
    let mut guest = Guest::new();
    let (mut stream, end) = connect(&mut guest, 10);
    let task = Task::default();
    while task.write(&mut stream, &[0; 10_000]).is_ready() {}
    end.shutdown(&mut guest, SHUTDOWN_RCV);
    assert_eq!(task.wakes(), 1);
    assert_eq!(failure(task.write(&mut stream, b"x")), ErrorKind::BrokenPipe);
    end.write(&mut guest, b"but writes");
    assert_eq!(ready(task.read(&mut stream, 100)), b"but writes");
}

#[test]
fn the_host_half_closes_after_its_data() {
    let mut guest = Guest::new();
    let (mut stream, mut end) = connect(&mut guest, 3);
    let task = Task::default();
    assert_eq!(ready(task.write(&mut stream, b"abcdef")), 6);
    shut(&mut stream);
    assert_eq!(failure(task.write(&mut stream, b"g")), ErrorKind::BrokenPipe);
    assert_eq!(guest.receive().unwrap().1, b"abc");
    guest.expect(Op::CreditRequest);
    end.fwd_cnt = 3;
    end.say(&mut guest, Op::CreditUpdate);
    assert_eq!(guest.receive().unwrap().1, b"def");
    assert_eq!(guest.expect(Op::Shutdown).flags, SHUTDOWN_SEND);
    end.write(&mut guest, b"reply");
    assert_eq!(ready(task.read(&mut stream, 100)), b"reply");
    end.shutdown(&mut guest, SHUTDOWN_BOTH);
    guest.expect(Op::Rst);
    assert_eq!(ready(task.read(&mut stream, 100)), b"");
}

#[test]
fn a_dropped_stream_delivers_and_closes() {
    let mut guest = Guest::new();
    let (mut stream, mut end) = connect(&mut guest, 4);
    assert_eq!(ready(Task::default().write(&mut stream, b"12345678")), 8);
    drop(stream);
    assert_eq!(guest.receive().unwrap().1, b"1234");
    guest.expect(Op::CreditRequest);
    // What the guest still sends goes nowhere, but it gets its credit back.
    for _ in 0..3 {
        for _ in 0..CAPACITY / 4 / MAX_PAYLOAD as usize {
            end.write(&mut guest, &[0; MAX_PAYLOAD as usize]);
        }
        guest.expect(Op::CreditUpdate);
    }
    end.fwd_cnt = 4;
    end.say(&mut guest, Op::CreditUpdate);
    assert_eq!(guest.receive().unwrap().1, b"5678");
    assert_eq!(guest.expect(Op::Shutdown).flags, SHUTDOWN_BOTH);
    assert_eq!(guest.counts().0, 1, "waits for the guest to close");
    end.say(&mut guest, Op::Rst);
    guest.silent();
    assert_eq!(guest.counts(), (0, 0, 0));
}

#[test]
fn nothing_is_lost_when_the_guest_has_no_buffers() {
    let mut guest = Guest::with_buffers(2);
    let (mut stream, end) = connect(&mut guest, 1 << 20);
    guest.repost = false;
    let task = Task::default();
    let data = pattern(50_000);
    assert_eq!(ready(task.write(&mut stream, &data)), data.len());
    // These need an answer too.
    end.say(&mut guest, Op::CreditRequest);
    let mut stray = end;
    stray.guest = 9;
    stray.say(&mut guest, Op::Rw);
    let mut received = Vec::new();
    let mut others = Vec::new();
    for _ in 0..20 {
        while let Some((header, payload)) = guest.receive() {
            received.extend(payload);
            if header.op != Op::Rw as u16 {
                others.push(header.op);
            }
        }
        guest.post(1);
    }
    assert!(received == data);
    assert_eq!(others, [Op::Rst as u16], "credit was told by the data packets");
}

#[test]
fn the_guest_connects_to_a_listener() {
    let mut guest = Guest::new();
    let task = Task::default();
    let end = End { host: 80, guest: 5000, buf_alloc: 4096, fwd_cnt: 0 };
    end.say(&mut guest, Op::Request);
    guest.expect(Op::Rst);

    let connector = guest.connector();
    let mut listener = connector.listen(80).unwrap();
    assert_eq!(listener.port(), 80);
    assert_eq!(connector.listen(80).unwrap_err().kind(), ErrorKind::AddrInUse);
    let mut stream = {
        let mut accepting = pin!(listener.accept());
        assert!(task.poll(accepting.as_mut()).is_pending());
        end.say(&mut guest, Op::Request);
        assert_eq!(task.wakes(), 1);
        assert_eq!(guest.expect(Op::Response).src_port, 80);
        ready(task.poll(accepting.as_mut()))
    };
    assert_eq!((stream.host_port(), stream.guest_port()), (80, 5000));
    end.write(&mut guest, b"GET");
    assert_eq!(ready(task.read(&mut stream, 10)), b"GET");
    assert_eq!(ready(task.write(&mut stream, b"200")), 3);
    assert_eq!(guest.receive().unwrap().1, b"200");

    // One that nobody accepts any more.
    let late = End { guest: 5001, ..end };
    late.say(&mut guest, Op::Request);
    guest.expect(Op::Response);
    drop(listener);
    assert_eq!(guest.expect(Op::Rst).dst_port, 5001);
    late.say(&mut guest, Op::Request);
    guest.expect(Op::Rst);
    end.write(&mut guest, b"!");
    assert_eq!(ready(task.read(&mut stream, 10)), b"!", "accepted streams live on");
}

#[test]
fn tokio_tasks_on_several_threads() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    // The guest echoes; writer and reader run on their own threads against it.
    let mut guest = Guest::new();
    let (stream, mut end) = connect(&mut guest, 32 * 1024);
    let data = pattern(3 << 20);
    let expected = data.clone();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    let (mut reader, mut writer) = tokio::io::split(stream);
    let writing = runtime.spawn(async move {
        writer.write_all(&data).await.unwrap();
        writer.shutdown().await.unwrap();
    });
    let reading = runtime.spawn(async move {
        let mut received = Vec::new();
        reader.read_to_end(&mut received).await.unwrap();
        received
    });
    let (mut window, mut sent, mut backlog, mut finished) = (CAPACITY, 0u32, Vec::new(), false);
    while !reading.is_finished() {
        let mut heard = false;
        while let Some((header, payload)) = guest.receive() {
            heard = true;
            if Op::from_wire(header.op) == Some(Op::Rst) {
                // The answer to our shutdown, which may come before the reader has seen the end; it carries no credit.
                continue;
            }
            window = CAPACITY - sent.wrapping_sub(header.fwd_cnt) as usize;
            end.fwd_cnt = end.fwd_cnt.wrapping_add(header.len);
            backlog.extend(payload);
            match Op::from_wire(header.op) {
                Some(Op::CreditRequest) => end.say(&mut guest, Op::CreditUpdate),
                Some(Op::Shutdown) => finished = true,
                _ => {}
            }
        }
        while window > 0 && !backlog.is_empty() {
            let count = window.min(backlog.len()).min(4000);
            let piece: Vec<u8> = backlog.drain(..count).collect();
            end.write(&mut guest, &piece);
            window -= count;
            sent += count as u32;
        }
        if heard {
            end.say(&mut guest, Op::CreditUpdate);
        }
        if finished && backlog.is_empty() {
            end.shutdown(&mut guest, SHUTDOWN_BOTH);
            finished = false;
        }
        std::thread::yield_now();
    }
    runtime.block_on(writing).unwrap();
    assert!(runtime.block_on(reading).unwrap() == expected);
}
