//! Users and groups, read from `passwd` and `group`. No name service switch: glibc would load shared libraries into a static program.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use amber_proto::ErrorCode;

use crate::conn::{Result, failure};

/// Bytes of `passwd` or `group` that are read; what lies beyond is not seen.
const MAX_FILE: u64 = 4 << 20;

/// A user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) home: String,
}

/// The user with a name. Unknown names are E2B's `invalid username`.
pub(crate) fn user(etc: &Path, name: &str) -> Result<User> {
    let text = read(&etc.join("passwd"));
    parse_users(&text)
        .find(|user| user.name == name)
        .ok_or_else(|| failure(ErrorCode::Unauthenticated, format!("invalid username: '{name}'")))
}

/// The groups of a user: the own one and those that name the user.
pub(crate) fn groups(etc: &Path, user: &User) -> Vec<u32> {
    let text = read(&etc.join("group"));
    let mut groups = vec![user.gid];
    for (_, gid, members) in parse_groups(&text) {
        if gid != user.gid && members.split(',').any(|member| member == user.name) {
            groups.push(gid);
        }
    }
    groups
}

/// Names of users and groups by number, for listings.
#[derive(Debug, Default)]
pub(crate) struct Names {
    users: BTreeMap<u32, String>,
    groups: BTreeMap<u32, String>,
}

impl Names {
    pub(crate) fn read(etc: &Path) -> Self {
        let mut names = Self::default();
        for user in parse_users(&read(&etc.join("passwd"))) {
            names.users.entry(user.uid).or_insert(user.name);
        }
        for (name, gid, _) in parse_groups(&read(&etc.join("group"))) {
            names.groups.entry(gid).or_insert_with(|| name.to_owned());
        }
        names
    }

    /// Name of a user, or the number.
    pub(crate) fn user(&self, uid: u32) -> String {
        self.users.get(&uid).cloned().unwrap_or_else(|| uid.to_string())
    }

    /// Name of a group, or the number.
    pub(crate) fn group(&self, gid: u32) -> String {
        self.groups.get(&gid).cloned().unwrap_or_else(|| gid.to_string())
    }
}

fn parse_users(text: &str) -> impl Iterator<Item = User> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1)?;
        let home = if home.is_empty() { "/" } else { home };
        Some(User { name: name.to_owned(), uid, gid, home: home.to_owned() })
    })
}

fn parse_groups(text: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some((name, gid, fields.next().unwrap_or_default()))
    })
}

/// The text of a file, as much as can be read.
fn read(path: &Path) -> String {
    // Room for an ordinary file, so that it takes one call to read.
    let mut bytes = Vec::with_capacity(4096);
    // A FIFO in place of the file must not block process 1.
    if let Ok(file) = rustix::fs::open(
        path,
        rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC | rustix::fs::OFlags::NONBLOCK,
        rustix::fs::Mode::empty(),
    ) {
        // Whatever has been read before an error is used.
        let _ = File::from(file).take(MAX_FILE).read_to_end(&mut bytes);
    }
    String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_users_and_groups_up() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(
            dir.path().join("passwd"),
            "root:x:0:0:root:/root:/bin/bash\n\nbroken line\n:x:1:1::/:/x\nbad:x:one:1::/:\nuser:x:1000:1001:,,,:/home/user:/bin/bash\nbare:x:5:5::",
        )
        .unwrap();
        std::fs::write(
            dir.path().join("group"),
            "root:x:0:\nsudo:x:27:a,user\nother:x:28:users\nuser:x:1001:user\nshort:x:9",
        )
        .unwrap();
        let found = user(dir.path(), "user").unwrap();
        assert_eq!(found, User { name: "user".into(), uid: 1000, gid: 1001, home: "/home/user".into() });
        assert_eq!(groups(dir.path(), &found), vec![1001, 27]);
        assert_eq!(user(dir.path(), "bare").unwrap().home, "/");
        assert!(user(dir.path(), "bad").is_err() && user(dir.path(), "").is_err());
        let names = Names::read(dir.path());
        assert_eq!(
            (names.user(1000), names.group(27), names.user(77)),
            ("user".into(), "sudo".into(), "77".into())
        );
        assert_eq!(names.group(9), "short");
    }
}
