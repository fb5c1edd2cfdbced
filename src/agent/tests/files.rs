//! Files: contents, metadata, listings, and what is left when things go wrong.

use std::collections::BTreeMap;

use super::*;
use crate::agent::{EntryInfo, FileType, Read, Write};

fn write(path: &str) -> Write {
    Write { path: path.into(), ..Write::default() }
}

fn names(entries: &[EntryInfo], base: &Path) -> Vec<String> {
    entries
        .iter()
        .map(|entry| Path::new(&entry.path).strip_prefix(base).unwrap().to_str().unwrap().to_owned())
        .collect()
}

#[tokio::test]
async fn writes_and_reads() {
    let guest = Guest::start().await;
    let entry = guest.agent.write(&write("new/sub/file.txt"), b"content").await.unwrap();
    assert_eq!(
        (entry.name.as_str(), entry.path.as_str()),
        ("file.txt", guest.path("new/sub/file.txt").as_str())
    );
    assert_eq!(
        (entry.kind, entry.size, entry.mode, entry.permissions.as_str()),
        (FileType::File, 7, 0o644, "-rw-r--r--")
    );
    assert_eq!((entry.owner.as_str(), entry.group.as_str(), entry.symlink_target), ("user", "user", None));
    assert!(entry.modified_ns > 1_700_000_000_000_000_000);
    let parent = fs::metadata(guest.path("new")).unwrap();
    let home = fs::metadata(guest.home()).unwrap();
    assert_eq!((parent.uid(), parent.gid(), parent.mode() & 0o777), (home.uid(), home.gid(), 0o755));
    let read = async |path: &str| guest.agent.read_file(path, None, 1 << 20).await;
    assert_eq!(read("~/new/sub/file.txt").await.unwrap(), b"content");
    // Shorter, empty, absolute.
    guest.agent.write(&write(&guest.path("new/sub/file.txt")), b"c").await.unwrap();
    assert_eq!(read("new/sub/file.txt").await.unwrap(), b"c");
    let entry = guest.agent.write(&write("new/sub/file.txt"), b"").await.unwrap();
    assert_eq!((entry.size, read("new/sub/file.txt").await.unwrap()), (0, Vec::new()));
    assert!(
        !read("/proc/self/status").await.unwrap().is_empty(),
        "Files of /proc have no size and still content"
    );
    assert!(matches!(
        guest.agent.read_file("/proc/self/status", None, 10).await,
        Err(AgentError::InvalidArgument(_))
    ));
}

#[tokio::test]
async fn large_files_and_ranges() {
    let guest = Guest::start().await;
    let content: Vec<u8> =
        (0..5_000_000u32).flat_map(|index| index.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    for _ in 0..2 {
        // The second time over an existing file, which is gathered before it is replaced.
        let mut writer = guest.agent.write_stream(&write("large")).await.unwrap();
        for chunk in content.chunks(700_000) {
            writer.send(chunk).await.unwrap();
        }
        assert_eq!(writer.finish().await.unwrap().size, content.len() as u64);
        assert!(fs::read(guest.path("large")).unwrap() == content);
    }
    assert!(guest.agent.read_file("large", None, u64::MAX).await.unwrap() == content);
    let read = Read { path: "large".into(), offset: 1_000_001, length: Some(300_000), ..Read::default() };
    let mut reader = guest.agent.read(&read).await.unwrap();
    assert_eq!(reader.size(), content.len() as u64);
    let mut range = Vec::new();
    while let Some(chunk) = reader.next().await.unwrap() {
        range.extend(chunk);
    }
    assert!(range == content[1_000_001..1_300_001]);
    // A reader that loses interest leaves nothing behind.
    drop(guest.agent.read(&Read { path: "large".into(), ..Read::default() }).await.unwrap());
    assert_eq!(guest.agent.list("~", None, 1).await.unwrap().len(), 1);
}

#[tokio::test]
async fn an_overwritten_file_stays_the_same_file() {
    let guest = Guest::start().await;
    let path = guest.path("f");
    for length in [10, 3_000_000] {
        fs::write(&path, vec![b'o'; 2_000_000]).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o750)).unwrap();
        fs::hard_link(&path, guest.path("hard")).unwrap();
        std::os::unix::fs::symlink("f", guest.path("soft")).unwrap();
        let inode = fs::metadata(&path).unwrap().ino();
        let entry = guest.agent.write(&write("soft"), &vec![b'n'; length]).await.unwrap();
        assert_eq!((entry.symlink_target.as_deref(), entry.mode), (Some(path.as_str()), 0o750));
        assert_eq!(fs::metadata(&path).unwrap().ino(), inode);
        assert!(fs::read(guest.path("hard")).unwrap() == vec![b'n'; length]);
        let entry = guest.agent.write(&Write { mode: Some(0o600), ..write("f") }, b"x").await.unwrap();
        assert_eq!(entry.mode, 0o600);
        fs::remove_file(guest.path("hard")).unwrap();
        fs::remove_file(guest.path("soft")).unwrap();
    }
    // A link to nothing creates what it points to.
    std::os::unix::fs::symlink("target", guest.path("dangling")).unwrap();
    guest.agent.write(&write("dangling"), b"x").await.unwrap();
    assert_eq!(fs::read(guest.path("target")).unwrap(), b"x");
}

#[tokio::test]
async fn an_upload_that_is_cut_leaves_what_was_there() {
    let guest = Guest::start().await;
    fs::write(guest.path("old"), "old").unwrap();
    for path in ["old", "fresh"] {
        let mut writer = guest.agent.write_stream(&write(path)).await.unwrap();
        for _ in 0..30 {
            writer.send(&[b'x'; 100_000]).await.unwrap();
        }
        drop(writer);
    }
    while Path::new(&guest.path("fresh")).exists() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(fs::read(guest.path("old")).unwrap(), b"old");
    assert_eq!(names(&guest.agent.list("~", None, 1).await.unwrap(), &guest.home()), ["old"]);
}

#[tokio::test]
async fn a_full_disk_leaves_nothing_half_written() {
    let guest = Guest::start().await;
    // A small file system needs privileges to mount; in a user's own test run there is none.
    let disk = guest.path("disk");
    fs::create_dir(&disk).unwrap();
    let mount = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=4m,mode=777", "tmpfs", &disk])
        .stderr(Stdio::null())
        .status();
    if !mount.is_ok_and(|status| status.success()) {
        return;
    }
    fs::write(guest.path("disk/old"), vec![b'o'; 100_000]).unwrap();
    let large = vec![b'x'; 6 << 20];
    let mut failures = Vec::new();
    for path in ["disk/old", "disk/fresh"] {
        // Announced, and found out on the way.
        failures.push(guest.agent.write(&write(path), &large).await.map(drop));
        let mut writer = guest.agent.write_stream(&write(path)).await.unwrap();
        let mut sent = Ok(());
        for chunk in large.chunks(200_000) {
            sent = writer.send(chunk).await;
            if sent.is_err() {
                break;
            }
        }
        failures.push(match sent {
            Ok(()) => writer.finish().await.map(drop),
            error => error,
        });
    }
    let left = guest.agent.list("disk", None, 1).await.unwrap();
    let old = fs::read(guest.path("disk/old")).unwrap();
    let fits = guest.agent.write(&write("disk/fits"), &large[..2 << 20]).await;
    Command::new("umount").arg(&disk).status().unwrap();
    for failure in failures {
        assert!(matches!(failure, Err(AgentError::NotEnoughSpace(_))), "{failure:?}");
    }
    assert_eq!((left.len(), old), (1, vec![b'o'; 100_000]));
    fits.unwrap();
}

#[tokio::test]
async fn metadata_is_replaced_as_a_whole() {
    let guest = Guest::start().await;
    let map = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    };
    let first = guest.agent.write_file("f", None, map(&[("Author", "me"), ("kept", "no")]), b"1").await;
    if matches!(&first, Err(AgentError::InvalidArgument(_) | AgentError::Internal(_))) {
        return; // The file system of the test has no user attributes.
    }
    assert_eq!(first.unwrap().metadata, map(&[("author", "me"), ("kept", "no")]));
    guest.agent.write_file("f", None, map(&[("only", "this")]), b"2").await.unwrap();
    assert_eq!(guest.agent.stat("f", None).await.unwrap().metadata, map(&[("only", "this")]));
    assert_eq!(guest.agent.rename("f", "g", None).await.unwrap().metadata, map(&[("only", "this")]));
    assert_eq!(guest.agent.list("~", None, 1).await.unwrap()[0].metadata, map(&[("only", "this")]));
    assert!(guest.agent.write(&write("g"), b"3").await.unwrap().metadata.is_empty());
    for (key, value) in [("", "x".to_owned()), ("a\0b", "x".to_owned()), ("k", "v".repeat(100_000))] {
        let error = guest.agent.write_file("h", None, map(&[(key, &value)]), b"").await.unwrap_err();
        assert!(matches!(error, AgentError::InvalidArgument(_)), "{error:?}");
        assert!(!Path::new(&guest.path("h")).exists());
    }
}

#[tokio::test]
async fn listings() {
    let guest = Guest::start().await;
    for path in ["t/b/x/deep", "t/b/y", "t/a", "t/c/z"] {
        guest.agent.write(&write(path), b"").await.unwrap();
    }
    std::os::unix::fs::symlink("b", guest.path("t/link")).unwrap();
    let list =
        async |depth| names(&guest.agent.list("t", None, depth).await.unwrap(), &guest.home().join("t"));
    assert_eq!(list(1).await, ["a", "b", "c", "link"]);
    assert_eq!(list(2).await, ["a", "b", "b/x", "b/y", "c", "c/z", "link"]);
    assert_eq!(list(u32::MAX).await, ["a", "b", "b/x", "b/x/deep", "b/y", "c", "c/z", "link"]);
    let entries = guest.agent.list("t", None, 1).await.unwrap();
    assert_eq!((entries[3].kind, entries[3].permissions.as_str()), (FileType::Dir, "Lrwxrwxrwx"));
    assert_eq!(entries[3].symlink_target.as_deref(), Some(guest.path("t/b").as_str()));
    // Through a link to the directory, under the link's name.
    assert_eq!(guest.agent.list("t/link", None, 1).await.unwrap()[0].path, guest.path("t/link/x"));
    assert!(matches!(guest.agent.list("t/a", None, 1).await, Err(AgentError::InvalidArgument(_))));
    assert!(matches!(guest.agent.list("nothing", None, 1).await, Err(AgentError::NotFound(_))));
    // More than one reply, and names that are no text.
    let many = guest.home().join("many");
    fs::create_dir(&many).unwrap();
    for index in 0..5000 {
        fs::write(many.join(format!("{index:05}-{}", "n".repeat(200))), "").unwrap();
    }
    use std::os::unix::ffi::OsStrExt;
    fs::write(many.join(std::ffi::OsStr::from_bytes(b"z\xff")), "").unwrap();
    let entries = guest.agent.list("many", None, 1).await.unwrap();
    assert!(entries.len() == 5001 && entries.is_sorted_by(|a, b| a.name < b.name), "{}", entries.len());
    assert_eq!(entries[5000].name, "z\u{fffd}");
}

#[tokio::test]
async fn directories_renames_removals() {
    let guest = Guest::start().await;
    let agent = &guest.agent;
    let made = agent.make_dir("a/b/c", None).await.unwrap();
    assert_eq!(
        (made.kind, made.permissions.as_str(), made.owner.as_str()),
        (FileType::Dir, "drwxr-xr-x", "user")
    );
    assert!(matches!(agent.make_dir("a/b", None).await, Err(AgentError::AlreadyExists(_))));
    agent.write(&write("a/f"), b"x").await.unwrap();
    assert!(matches!(agent.make_dir("a/f", None).await, Err(AgentError::InvalidArgument(_))));
    assert!(matches!(agent.make_dir("a/f/g", None).await, Err(AgentError::InvalidArgument(_))));
    let entry = agent.rename("a/f", "x/y/z", None).await.unwrap();
    assert_eq!((entry.path.as_str(), entry.size), (guest.path("x/y/z").as_str(), 1));
    assert!(matches!(agent.rename("a/f", "q", None).await, Err(AgentError::NotFound(_))));
    agent.remove("a", None).await.unwrap();
    agent.remove("a", None).await.unwrap();
    agent.remove("x/y/z", None).await.unwrap();
    assert!(!Path::new(&guest.path("a")).exists() && Path::new(&guest.path("x/y")).exists());
    assert!(matches!(agent.remove("/", None).await, Err(AgentError::InvalidArgument(_))));
}

#[tokio::test]
async fn wrong_paths() {
    let guest = Guest::start().await;
    let agent = &guest.agent;
    fs::create_dir(guest.path("d")).unwrap();
    assert!(Command::new("mkfifo").arg(guest.path("fifo")).status().unwrap().success());
    std::os::unix::fs::symlink("loop", guest.path("loop")).unwrap();
    let long = "n".repeat(4096);
    let read = async |path: &str| agent.read_file(path, None, 100).await.unwrap_err();
    for path in ["missing", "d/missing"] {
        let message = format!("path '{}' does not exist", guest.path(path));
        assert!(matches!(read(path).await, AgentError::NotFound(text) if text == message));
    }
    assert!(matches!(read("d").await, AgentError::InvalidArgument(text) if text.ends_with("is a directory")));
    for path in ["fifo", "/dev/zero", "loop", "a\0b", "~other/x", &long] {
        assert!(matches!(read(path).await, AgentError::InvalidArgument(_)), "{path}");
        let error = agent.write(&write(path), b"x").await.unwrap_err();
        assert!(matches!(error, AgentError::InvalidArgument(_)), "{path}: {error:?}");
    }
    assert!(matches!(agent.write(&write("d"), b"x").await, Err(AgentError::InvalidArgument(_))));
    assert!(matches!(agent.stat("missing", None).await, Err(AgentError::NotFound(_))));
    assert!(matches!(agent.stat("d", Some("ghost")).await, Err(AgentError::Unauthenticated(_))));
    assert_eq!(agent.stat("fifo", None).await.unwrap().kind, FileType::Unknown);
    // A refusal long before the data is sent is heard: 100 MB never arrive.
    let error = agent
        .write(&Write { user: Some("ghost".into()), ..write("x") }, &vec![0; 100_000_000])
        .await
        .unwrap_err();
    assert!(matches!(error, AgentError::Unauthenticated(_)), "{error:?}");
}
