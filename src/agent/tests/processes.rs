//! Processes: users, environment, exits, signals, input, terminals, streams.

use super::*;
use crate::agent::{PtySize, Target};

#[tokio::test]
async fn exit_codes_and_output() {
    let guest = Guest::start().await;
    let run = guest.sh("echo out; echo err >&2; exit 3").await;
    assert_eq!((run.text(), run.err.as_slice()), ("out\n", b"err\n".as_slice()));
    let exit = run.exit;
    assert_eq!((exit.exit_code, exit.exited, exit.error.as_deref()), (3, true, Some("exit status 3")));
    let exit = guest.sh("exit 0").await.exit;
    assert_eq!((exit.exit_code, exit.status.as_str(), exit.error), (0, "exit status 0", None));
    let exit = guest.sh("kill -9 $$").await.exit;
    assert_eq!((exit.exit_code, exit.exited, exit.signal), (-1, false, Some(9)));
    assert_eq!(exit.error.as_deref(), Some("signal: killed"));
    assert!(!exit.timed_out);
}

#[tokio::test]
async fn environment_and_directory() {
    let guest = Guest::start().await;
    let identify = amber_proto::Identify {
        sandbox_id: "i123".into(),
        envs: [("FROM", "sandbox"), ("BOTH", "sandbox"), ("HOME", "/sandbox")]
            .map(|(k, v)| (k.into(), v.into()))
            .into(),
        ..Default::default()
    };
    guest.agent.identify(&identify).await.unwrap();
    assert_eq!(guest.agent.info().await.unwrap().sandbox_id.as_deref(), Some("i123"));
    let exec = Exec {
        envs: [("BOTH", "command"), ("EMPTY", "")].map(|(k, v)| (k.into(), v.into())).into(),
        ..shell("echo $FROM $BOTH $HOME $USER $LOGNAME ${EMPTY-unset}$(pwd); echo $PATH")
    };
    let out = run(guest.agent.exec(&exec).await.unwrap()).await;
    let home = guest.home();
    let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    assert_eq!(out.text(), format!("sandbox command /sandbox user user {}\n{path}\n", home.display()));

    // Relative directories and ~ are under the home of the user, whatever HOME says.
    fs::create_dir_all(home.join("a/b")).unwrap();
    for cwd in ["a/b", "~/a/b", "a/./x/../b", home.join("a/b").to_str().unwrap()] {
        let exec = Exec { cwd: Some(cwd.into()), ..shell("pwd") };
        let out = run(guest.agent.exec(&exec).await.unwrap()).await;
        assert_eq!(out.text().trim_end(), home.join("a/b").to_str().unwrap(), "{cwd}");
    }
    // Envs are merged, unless the guest is to forget them.
    let identify = amber_proto::Identify { reset_envs: true, ..Default::default() };
    guest.agent.identify(&identify).await.unwrap();
    assert_eq!(guest.sh("echo ${FROM-unset}").await.text(), "unset\n");
}

#[tokio::test]
async fn refusals() {
    let guest = Guest::start().await;
    let fail = async |exec: Exec| guest.agent.exec(&exec).await.unwrap_err();
    let error = fail(Exec { user: Some("nobody-here".into()), ..shell("true") }).await;
    assert!(
        matches!(&error, AgentError::Unauthenticated(message) if message == "invalid username: 'nobody-here'"),
        "{error:?}"
    );
    let error = fail(Exec { cwd: Some("missing".into()), ..shell("true") }).await;
    let message = format!("cwd '{}' does not exist", guest.path("missing"));
    assert!(matches!(&error, AgentError::InvalidArgument(text) if *text == message), "{error:?}");
    let error = fail(Exec { cmd: "no-such-program".into(), ..Exec::default() }).await;
    assert!(
        matches!(&error, AgentError::InvalidArgument(text) if text.contains("not found in $PATH")),
        "{error:?}"
    );
    for exec in [
        Exec { cmd: "/no/such/program".into(), ..Exec::default() },
        Exec { cmd: String::new(), ..Exec::default() },
        Exec { cwd: Some("/etc/passwd".into()), ..shell("true") },
        shell("a\0b"),
    ] {
        let error = fail(exec).await;
        assert!(matches!(error, AgentError::InvalidArgument(_)), "{error:?}");
    }
    assert!(guest.agent.processes().await.unwrap().is_empty());
    // A program without a slash is found.
    let exec = Exec { cmd: "true".into(), ..Exec::default() };
    assert_eq!(guest.agent.exec(&exec).await.unwrap().wait().await.unwrap().exit_code, 0);
    assert!(guest.children().is_empty(), "No zombie is left of those that failed");
}

#[tokio::test]
async fn without_stdin_there_is_dev_null() {
    let guest = Guest::start().await;
    assert_eq!(guest.sh("readlink /proc/self/fd/0; cat; echo end").await.text(), "/dev/null\nend\n");
    let error = guest.agent.send_stdin(999_999, b"x").await.unwrap_err();
    assert!(matches!(error, AgentError::NotFound(_)), "{error:?}");
    let process = guest.agent.exec(&shell("sleep 100")).await.unwrap();
    let error = guest.agent.send_stdin(process.pid(), b"x").await.unwrap_err();
    assert!(matches!(error, AgentError::FailedPrecondition(_)), "{error:?}");
    let open_files = guest.sh("ls /proc/self/fd").await;
    assert_eq!(
        open_files.text().split_ascii_whitespace().collect::<Vec<_>>(),
        ["0", "1", "2", "3"],
        "3 is ls's own"
    );
}

#[tokio::test]
async fn stdin_in_order_and_closed() {
    let guest = Guest::start().await;
    let exec = Exec { stdin: true, ..shell("cat; echo end") };
    let process = guest.agent.exec(&exec).await.unwrap();
    let pid = process.pid();
    let large: Vec<u8> = (0..3_000_000u32).map(|index| index.to_le_bytes()[index as usize % 3]).collect();
    let reader = tokio::spawn(run(process));
    guest.agent.send_stdin(pid, b"first").await.unwrap();
    guest.agent.send_stdin(pid, b"").await.unwrap();
    guest.agent.send_stdin(pid, &large).await.unwrap();
    guest.agent.close_stdin(pid).await.unwrap();
    let out = reader.await.unwrap().out;
    assert_eq!(out.len(), 5 + large.len() + 4);
    assert!(out.starts_with(b"first") && out[5..5 + large.len()] == large && out.ends_with(b"end\n"));
    let error = guest.agent.close_stdin(pid).await.unwrap_err();
    assert!(matches!(error, AgentError::NotFound(_)), "{error:?}");
}

#[tokio::test]
async fn stdin_of_a_process_that_never_reads() {
    let guest = Guest::start().await;
    let process = guest.agent.exec(&Exec { stdin: true, ..shell("sleep 100") }).await.unwrap();
    let pid = process.pid();
    let agent = guest.agent.clone();
    let sender = tokio::spawn(async move { agent.send_stdin(pid, &vec![0; 1 << 20]).await });
    // Another operation is not held up, and the sender ends with the process.
    assert_eq!(guest.sh("echo ok").await.text(), "ok\n");
    guest.agent.signal(pid, 9).await.unwrap();
    let error = sender.await.unwrap().unwrap_err();
    assert!(matches!(error, AgentError::NotFound(_) | AgentError::FailedPrecondition(_)), "{error:?}");
}

#[tokio::test]
async fn listing_signals_and_tags() {
    let guest = Guest::start().await;
    let tagged = Exec {
        tag: Some("mine".into()),
        envs: [("A".to_owned(), "1".to_owned())].into(),
        cwd: Some("/".into()),
        ..shell("sleep 100")
    };
    let mut first = guest.agent.exec(&tagged).await.unwrap();
    let mut second =
        guest.agent.exec(&shell("trap 'exit 5' TERM; echo set; while :; do sleep 0.01; done")).await.unwrap();
    let list = guest.agent.processes().await.unwrap();
    assert_eq!(list.iter().map(|process| process.pid).collect::<Vec<_>>(), [first.pid(), second.pid()]);
    assert_eq!(
        (list[0].cmd.as_str(), list[0].tag.as_deref(), list[0].cwd.as_deref()),
        ("/bin/sh", Some("mine"), Some("/"))
    );
    assert_eq!(
        (list[0].args.as_slice(), &list[0].envs["A"]),
        (["-c".to_owned(), "sleep 100".to_owned()].as_slice(), &"1".to_owned())
    );
    read_until(&mut second, "set").await;
    guest.agent.signal(second.pid(), 15).await.unwrap();
    assert_eq!(second.wait().await.unwrap().exit_code, 5);
    guest.agent.signal(Target { pid: None, tag: Some("mine".into()) }, 9).await.unwrap();
    assert_eq!(first.wait().await.unwrap().error.as_deref(), Some("signal: killed"));
    for (target, signal) in
        [(Target::from(first.pid()), 9), (Target { pid: None, tag: Some("other".into()) }, 9)]
    {
        assert!(matches!(guest.agent.signal(target, signal).await, Err(AgentError::NotFound(_))));
    }
    assert!(guest.agent.processes().await.unwrap().is_empty());
}

#[tokio::test]
async fn kill_and_timeout_take_the_group() {
    let guest = Guest::start().await;
    let exec = Exec { timeout_ms: Some(200), ..shell("sleep 100 & echo $!; sleep 100") };
    let run = run(guest.agent.exec(&exec).await.unwrap()).await;
    assert!(run.exit.timed_out && run.exit.exit_code == -1 && run.exit.signal == Some(9), "{:?}", run.exit);
    let child = run.text().trim();
    // The child of the shell is reaped by the agent, which takes a moment.
    while Path::new("/proc").join(child).exists() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_disconnected_process_goes_on() {
    let guest = Guest::start().await;
    let mark = guest.path("mark");
    let script = format!(
        "echo first; while [ ! -e {mark}.go ]; do sleep 0.01; done; head -c 1000000 /dev/zero; echo done > {mark}"
    );
    let mut process = guest.agent.exec(&shell(&script)).await.unwrap();
    let pid = process.pid();
    read_until(&mut process, "first").await;
    drop(process);
    fs::write(format!("{mark}.go"), "").unwrap();
    while !fs::read(&mark).is_ok_and(|content| content == b"done\n") {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // Attached late, or after the end: the exit is still there, the output is not.
    let late = run(guest.agent.attach(pid).await.unwrap()).await;
    assert_eq!(late.exit.exit_code, 0);
    assert!(matches!(guest.agent.attach(999_999).await, Err(AgentError::NotFound(_))));
}

#[tokio::test]
async fn two_handles_see_the_same() {
    let guest = Guest::start().await;
    let exec = Exec { stdin: true, ..shell("cat") };
    let process = guest.agent.exec(&exec).await.unwrap();
    let pid = process.pid();
    let other = guest.agent.attach(pid).await.unwrap();
    let (one, two) = (tokio::spawn(run(process)), tokio::spawn(run(other)));
    guest.agent.send_stdin(pid, &vec![b'x'; 500_000]).await.unwrap();
    guest.agent.close_stdin(pid).await.unwrap();
    for run in [one.await.unwrap(), two.await.unwrap()] {
        assert_eq!((run.out.len(), run.exit.exit_code), (500_000, 0));
    }
}

#[tokio::test]
async fn a_large_stream_loses_nothing() {
    let guest = Guest::start().await;
    let mut process = guest
        .agent
        .exec(&shell("head -c 300000000 /dev/zero; seq 1 200000; seq 1 100000 >&2"))
        .await
        .unwrap();
    let (mut out, mut err, mut tail) = (0, 0, Vec::new());
    let exit = loop {
        match process.next().await.unwrap().unwrap() {
            Event::Stdout(data) => {
                out += data.len();
                tail.extend_from_slice(&data);
                tail.drain(..tail.len().saturating_sub(64));
            }
            Event::Stderr(data) => err += data.len(),
            Event::Pty(_) => panic!("No terminal"),
            Event::End(exit) => break exit,
        }
    };
    assert_eq!((out, err, exit.exit_code), (300_000_000 + 1_288_895, 588_895, 0));
    assert!(tail.ends_with(b"199999\n200000\n"));
    let status = fs::read_to_string(format!("/proc/{}/status", guest.child.id())).unwrap();
    let peak: usize = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap()
        .trim()
        .split(' ')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    assert!(peak < 64 << 10, "{peak} kB");
}

#[tokio::test]
async fn a_slow_reader_gets_everything_after_the_end() {
    let guest = Guest::start().await;
    let mut process = guest.agent.exec(&shell("head -c 400000 /dev/zero; echo last")).await.unwrap();
    // Far more than the sockets and pipes hold is left when the reader begins.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let mut out = 0;
    loop {
        match process.next().await.unwrap().unwrap() {
            Event::Stdout(data) => out += data.len(),
            Event::End(exit) => break assert_eq!(exit.exit_code, 0),
            event => panic!("{event:?}"),
        }
    }
    assert_eq!(out, 400_005);
}

#[tokio::test]
async fn background_children_do_not_hold_the_result() {
    let guest = Guest::start().await;
    // The background child holds the pipes for 100 s; its output before the end of the shell is there.
    let run = guest.sh("(echo early; sleep 100) & sleep 0.05; echo shell").await;
    assert_eq!(run.exit.exit_code, 0);
    let mut lines: Vec<_> = run.text().lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["early", "shell"]);
    // One that never stops writing does not, either, and is not killed by a closed pipe.
    let run = guest.sh("yes & echo $!").await;
    let pid: u32 = run.text().lines().find(|line| *line != "y").unwrap().parse().unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(Path::new(&format!("/proc/{pid}/exe")).exists());
}

#[tokio::test]
async fn terminals() {
    let guest = Guest::start().await;
    let exec = Exec {
        cmd: "/bin/bash".into(),
        args: vec!["--norc".into(), "--noprofile".into(), "-i".into()],
        envs: [("PS1", "$ "), ("TERM", "xterm")].map(|(k, v)| (k.into(), v.into())).into(),
        pty: Some(PtySize { cols: 80, rows: 24 }),
        ..Exec::default()
    };
    let mut process = guest.agent.exec(&exec).await.unwrap();
    let pid = process.pid();
    assert!(guest.agent.processes().await.unwrap()[0].pty);
    read_until(&mut process, "$ ").await;
    guest.agent.send_stdin(pid, b"stty size; tty\n").await.unwrap();
    let seen = read_until(&mut process, "/dev/pts/").await;
    assert!(seen.contains("24 80"), "{seen}");
    guest.agent.resize_pty(pid, PtySize { cols: 100, rows: 30 }).await.unwrap();
    guest.agent.send_stdin(pid, b"stty size\n").await.unwrap();
    read_until(&mut process, "30 100").await;
    // The same shell after a reconnect.
    guest.agent.send_stdin(pid, b"X=kept\n").await.unwrap();
    read_until(&mut process, "X=kept").await;
    drop(process);
    let mut process = guest.agent.attach(pid).await.unwrap();
    guest.agent.send_stdin(pid, b"echo \"<$X>\"\n").await.unwrap();
    read_until(&mut process, "<kept>").await;
    // The end-of-file character ends a program on the terminal, and the shell goes on.
    // (The shell's line editor has left the terminal when the first command writes.)
    guest.agent.send_stdin(pid, b"echo ready-$((1+1)); cat; echo after-cat-$?\n").await.unwrap();
    read_until(&mut process, "ready-2").await;
    guest.agent.close_stdin(pid).await.unwrap();
    read_until(&mut process, "after-cat-0").await;
    guest.agent.send_stdin(pid, b"exit 4\n").await.unwrap();
    assert_eq!(process.wait().await.unwrap().exit_code, 4);
    let error = guest.agent.resize_pty(pid, PtySize { cols: 1, rows: 1 }).await.unwrap_err();
    assert!(matches!(error, AgentError::NotFound(_)), "{error:?}");
}

#[tokio::test]
async fn many_processes_and_no_zombies() {
    let guest = Guest::start().await;
    let mut tasks = Vec::new();
    for index in 0..300u32 {
        let agent = guest.agent.clone();
        tasks.push(tokio::spawn(async move {
            // Orphans whose parents end first come to the agent.
            let process = agent
                .exec(&shell(&format!(
                    "(sleep 0.01 > /dev/null 2>&1 &) ; echo {index}; exit {}",
                    index % 100
                )))
                .await
                .unwrap();
            let run = run(process).await;
            assert_eq!(
                (run.text(), run.exit.exit_code),
                (format!("{index}\n").as_str(), (index % 100).cast_signed())
            );
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    while !guest.children().is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(guest.agent.processes().await.unwrap().is_empty());
    let descriptors = fs::read_dir(format!("/proc/{}/fd", guest.child.id())).unwrap().count();
    assert!(descriptors < 20, "{descriptors} descriptors are left");
}
